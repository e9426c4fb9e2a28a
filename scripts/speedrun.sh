#!/bin/bash
# Run one piece of the CIFAR-10 speedrun (docs/speedrun.md): train for some minutes, score, and pack what is worth keeping.
#
#   scripts/speedrun.sh OUT MINUTES [option of train.py ...]
#
# Use it on a GPU that you get for a limited time. As long as runs/speedrun exists, the same command continues where the
# last piece stopped. On a fresh machine, set WEIGHTS to a folder with the files of an earlier OUT to start from them.
# OUT gets the weights in float16 (files of at most 15 MB), a picture, and speedrun.tar.gz with settings, metrics and scores.
#
#   IMAGES=7680000    length of the run; decay and milestones follow from it
#   WEIGHTS=FOLDER    start from these weights
#   N=50000           samples for the FID that can be cited
#   SWEEP=5000        samples for each guided setting
#   GUIDANCE=1.3,1.6,2.0
#   PYTHON=python     interpreter
#   REHEARSE=1        run everything in a few minutes on a CPU, with a tiny network, before you pay for a GPU
set -euo pipefail
out=${1:?usage: speedrun.sh OUT MINUTES [option of train.py ...]}; minutes=${2:?usage: speedrun.sh OUT MINUTES}; shift 2
mkdir -p "$out"; out=$(realpath "$out"); start=()
[ -z "${WEIGHTS:-}" ] || start=(--start_from "$(realpath "$WEIGHTS")")
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
name=speedrun; scored=(--compile default --precision bfloat16 --batch_size 1000); n=${N:-50000}; sweep=${SWEEP:-5000}
steps=18; few=5,10,20; guidance=${GUIDANCE:-1.3,1.6,2.0}
images=${IMAGES:-7680000}
recipe=(--config configs/cifar10_speedrun.yaml --trainer.logger false --images "$images")
recipe+=(--model.schedule.stable_images $((images * 43 / 100)))
recipe+=(--checkpoint.milestones "[$((images / 16)),$((images / 8)),$((images / 4))]")
if [ -n "${REHEARSE:-}" ]; then
  name=speedrun-rehearsal; scored=(--batch_size 20 --features pixels); n=${N:-20}; sweep=${SWEEP:-10}; steps=3; few=2; guidance=${GUIDANCE:-1.5}
  recipe+=(--model.net.channels 16 --model.net.multipliers "[1,2]" --model.net.blocks 1 --model.net.head_channels 16)
  recipe+=(--model.execution.compile null --data.batch_size 16 --images 320 --model.schedule.warmup_images 32 --model.schedule.stable_images 96)
  recipe+=(--ema.half_lives "[32,64]" --checkpoint.every 64 --checkpoint.milestones "[32,64]" --samples.every 160)
  recipe+=(--samples.columns 2 --samples.sampler.steps 2 --trainer.log_every_n_steps 5)
  recipe+=(--quality.every 160 --quality.n 10 --quality.batch_size 10 --quality.features fmlit.PixelFeatures)
fi

say() { printf '\n== %s (%d s)\n' "$*" $SECONDS; }

say "training, $minutes minutes at most"
status=0 # SIGTERM makes training save and end with 143
timeout --preserve-status --signal TERM --kill-after 90 "${minutes}m" \
  "$python" scripts/train.py "${recipe[@]}" --name "$name" --resume auto "${start[@]}" "$@" || status=$?
run=runs/$name # 137: it was killed while it saved; an earlier checkpoint is enough
case $status in
  0 | 143) ;;
  137) [ -e "$run/checkpoints/last.ckpt" ] || exit $status ;;
  *) exit $status ;;
esac

say "what is worth keeping"
rm -rf "$run/export"
"$python" scripts/export.py --checkpoint "$run" --dtype float16 --shard_mb 15 --out "$run/export"
rm -rf "$run/export/diffusers" "$run/export/README.md" "$out/weights" # keep nothing twice
mv "$run/export" "$out/weights"
picture=$(find "$run" -path "*/samples/*.png" | sort | tail -1)
[ -z "$picture" ] || cp "$picture" "$out/samples.png"

pack() { (cd "$run" && tar czf "$out/speedrun.tar.gz" $(ls -d config.yaml metrics.csv samples evaluation 2>/dev/null)); }
pack # now, in case the time runs out

score() { "$python" scripts/evaluate.py --checkpoint "$run" --out "$run/evaluation" "${scored[@]}" "$@"; pack; }
say "FID of $n samples, for each average"
for weights in $("$python" -c "import sys, yaml; print(*(f'ema_{h}' for h in yaml.safe_load(open(sys.argv[1]))['ema']['half_lives']))" "$run/config.yaml"); do
  score --weights "$weights" --n "$n" --solver heun --steps $steps --metrics fid,kid
done
say "autoguidance, $sweep samples each, without and with"
score --n "$sweep" --solver heun --steps $steps --metrics fid
for guide in "$run"/checkpoints/milestone-*.ckpt; do
  [ ! -e "$guide" ] || score --guide "$guide" --guidance "$guidance" --n "$sweep" --solver heun --steps $steps --metrics fid
done
say "few steps, $sweep samples each"
score --n "$sweep" --solver ipndm,unipc --steps $few --metrics fid
say "done: $out"
