"""The network of a LightningModule: built from the shape and the classes of the data, or handed over ready-made."""

from collections.abc import Callable, Sequence

from torch import nn

from fmlit.core.errors import UserError
from fmlit.core.internals import is_compiled
from fmlit.data.data_module import DataModule
from fmlit.models.generative_model import GenerativeModel

NetworkFactory = Callable[[Sequence[int], int | None], nn.Module]
AS_IN = "as in shape=(3, 32, 32)"


def build_network(
    net: NetworkFactory, shape: Sequence[int] | None, num_classes: int | None, conditional: bool
) -> tuple[nn.Module, tuple[int, ...], int | None]:
    """Build the network, unless ``net`` is one, and check that it fits the data.

    Args:
        net: a function of ``(shape, num_classes)`` that returns a network; or a network, which may carry ``shape`` and
            ``num_classes`` as attributes.
        shape: shape of one data point; None leaves it to the network.
        num_classes: number of classes of the data, or None.
        conditional: build a class-conditional network.

    Returns:
        The network, the shape of one data point, and the number of classes of a conditional network or None.

    Raises:
        UserError: they do not fit together; the message says what to write instead.
    """
    if isinstance(net, nn.Module):
        network, (shape, classes) = net, _read_off(net, shape, num_classes, conditional)
    else:
        if shape is None:
            raise UserError(f"shape: give the shape of one data point, {AS_IN}, or a network that is built already")
        if conditional and num_classes is None:
            raise UserError("conditional: true needs data with classes, and this data has none")
        classes = num_classes if conditional else None
        network = net(tuple(shape), classes)
    if is_compiled(network):
        wanted = "hand over the network itself, not what torch.compile returns"
        raise UserError(f"net: {wanted}, and add execution=fmlit.Execution(compile='default')")
    return network, tuple(shape), classes


def _read_off(
    net: nn.Module, shape: Sequence[int] | None, num_classes: int | None, conditional: bool
) -> tuple[Sequence[int], int | None]:
    """The shape and the number of classes of a network that is built already."""
    name = type(net).__name__
    own_shape = getattr(net, "shape", shape)
    if own_shape is None:
        raise UserError(f"shape: {name} has no attribute shape; give the shape of one data point, {AS_IN}")
    if shape is not None and tuple(own_shape) != tuple(shape):
        raise UserError(f"shape: {name} was built for {tuple(own_shape)}, not for {tuple(shape)}; leave shape out")
    classes: int | None = getattr(net, "num_classes", num_classes if conditional else None)
    if conditional and classes is None:
        raise UserError(f"conditional: {name} was built without classes; give it num_classes")
    if None not in (classes, num_classes) and classes != num_classes:
        raise UserError(f"num_classes: {name} was built for {classes}, not for {num_classes}; leave num_classes out")
    return own_shape, classes


def check_data(model: GenerativeModel, data: DataModule) -> None:
    """Check that a model fits the data.

    Raises:
        UserError: their shapes or their numbers of classes differ.
    """
    if model.shape != tuple(data.shape):
        raise UserError(f"the network is for data of shape {model.shape}, and the data has {tuple(data.shape)}")
    if model.num_classes is not None and model.num_classes != data.num_classes:
        raise UserError(f"the network has {model.num_classes} classes, and the data {data.num_classes or 'none'}")
