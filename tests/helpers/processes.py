"""The processes of a test, found in /proc."""

from pathlib import Path


def processes(folder: Path) -> dict[int, int]:
    """Local rank by process id, of all processes whose command names a folder."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and str(folder) in (entry / "cmdline").read_text():
                environment = dict(
                    pair.split("=", 1) for pair in (entry / "environ").read_text().split("\0") if "=" in pair
                )
                found[int(entry.name)] = int(environment.get("LOCAL_RANK", 0))
        except OSError:
            continue  # it has ended
    return found
