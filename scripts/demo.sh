#!/usr/bin/env bash
# The main job on the bundled blood-cell images: train a model with deformable convolutions, validate it, detect.
# Run by `make demo`; needs no GPU and no network. Everything it makes is in runs/demo.
set -euo pipefail
cd "$(dirname "$0")/.."

start=data/demo/yolov5n-dcn-start.pt
project=runs/demo
rm -rf "$project"

echo "== 1/4  a look at the data"
python train.py --data bccd.yaml --check-data

echo "== 2/4  training yolov5n-dcn for ${EPOCHS:=3} epochs, from $start"
python train.py --data bccd.yaml --weights "$start" --hyp data/hyps/hyp.demo.yaml --img 320 --batch 16 \
    --epochs "$EPOCHS" --workers 1 --project "$project" --name train

echo "== 3/4  validating on images that training never saw"
python val.py --data bccd.yaml --weights "$project/train/weights/best.pt" --img 320 --task test --project "$project" --name val

echo "== 4/4  detecting"
python detect.py --weights "$project/train/weights/best.pt" --source data/bccd/images/test --img 320 --save-txt \
    --project "$project" --name detect >"$project/detect.log"
tail -n 3 "$project/detect.log"

cat <<EOF

Done. What to look at:
  pictures with boxes    $project/detect/*.jpg
  curves of the training $project/train/results.png
  precision and recall   $project/val/PR_curve.png, confusion matrix $project/val/confusion_matrix.png
  the numbers            $project/train/results.csv
  live curves            .venv/bin/tensorboard --logdir $project
EOF
