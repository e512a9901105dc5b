#!/usr/bin/env bash
# Checks for a CUDA machine, in this order, within ten minutes. Rerun it to resume where it ended.
#
#     bash tools/gpu_check.sh                          resume, cifar10, speed, cifar100
#     DATA=/tmp/data bash tools/gpu_check.sh resume    some parts: resume, digits, cifar10, speed, cifar100
#     EXTRA="--subset 500 --num_epochs 1" ...          a trial of the script itself, on a CPU
#
# It needs the packages of requirements.txt; with PEAK=989 (TFLOP/s), kernels.log has the share of that peak.
# Logs and tables are written to $OUT: eight files, and two more if `digits` (no download needed) is named.
# CIFAR must be unpacked in $DATA where there is no network.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3} DATA=${DATA:-data} OUT=${OUT:-out} RUNS=${RUNS:-/tmp/gpu_check} EXTRA=${EXTRA:-}
LIMIT=${LIMIT:-580} # seconds in all
export OMP_NUM_THREADS=4 PYTHONUNBUFFERED=1
mkdir -p "$OUT" "$RUNS"

within() { # SECONDS COMMAND...: SIGTERM, which train.py can resume from, after SECONDS or at LIMIT
  local left=$((LIMIT - SECONDS < $1 ? LIMIT - SECONDS : $1))
  timeout --foreground -k 10 "$((left > 0 ? left : 1))" "${@:2}" # foreground: Ctrl-C reaches it, SIGTERM comes once
}

train() { within "$1" $PYTHON train.py --data_path "$DATA" "${@:2}" $EXTRA; }

kill_when_saved() { # FOLDER COMMAND...: SIGKILL a second after FOLDER has a student's resume state, or after 60 s
  "${@:2}" &
  local pid=$! i
  for i in {1..120}; do
    sleep 0.5
    kill -0 $pid 2> /dev/null || break
    compgen -G "$1/*student*.last.pt" && sleep 1 && break
  done > /dev/null
  kill -KILL $pid 2> /dev/null
  wait $pid
}

resume() { # a student with KD, killed by SIGKILL under way and resumed, is bit-equal to one that was not
  local name options
  for name in whole killed; do
    (
      options="--dataset digits --deterministic True --weights_path $RUNS/$name --plots_path $RUNS/$name/plots"
      train 90 --tto True $options
      options="--kd True $options --num_epochs 40"
      [ $name = killed ] && kill_when_saved "$RUNS/killed" $PYTHON train.py --data_path "$DATA" $options $EXTRA
      train 90 $options
    ) >> "$RUNS/resume_$name.log" 2>&1 &
  done
  wait
  tail -n +1 "$RUNS"/resume_*.log > "$OUT/resume.log"
  grep "resuming\|rror\|arning" "$OUT/resume.log"
  grep -q resuming "$RUNS/resume_killed.log" || echo "no run was resumed: equal weights mean nothing"
  $PYTHON - "$RUNS" << 'END'
import pathlib, sys, torch
for stem in ("digits_teacher", "digits_student_kd_t5"):
    models = [torch.load(path, weights_only=True)["model"] for name in ("whole", "killed")
              for path in pathlib.Path(sys.argv[1], name).glob(f"{stem}*.pt") if ".last" not in path.name]
    equal = len(models) == 2 and all(torch.equal(models[0][key], models[1][key]) for key in models[0])
    print(f"{stem}: bit-equal {equal}")
END
}

table() { # DATASET SECONDS: the teacher, then the students of three seeds at the same time, then the table
  local options="--dataset $1 --weights_path $RUNS/$1 --plots_path $RUNS/$1/plots" end=$((SECONDS + $2)) seed
  mkdir -p "$RUNS/$1"
  train "$2" --tto True $options 2>&1 | tee -a "$OUT/$1.log"
  for seed in 42 43 44; do
    train $((end - SECONDS)) --all True --seed $seed $options >> "$RUNS/$1/seed$seed.log" 2>&1 &
  done
  wait
  train 90 --all True --seeds 3 $options 2>&1 | tee -a "$OUT/$1.log"
  tar czf "$OUT/$1.tgz" -C "$RUNS/$1" --exclude='*teacher*' .
}

digits() { # what needs no download: the table, then other ways to train, and test.py, each with its exit code
  local options="--data_path $DATA --dataset digits --weights_path $RUNS/digits --plots_path $RUNS/digits/plots" words
  table digits 120
  while read -r words; do
    echo "+ $words"
    within 90 $PYTHON $words $options < /dev/null
    echo "exit code $?"
  done << END 2>&1 | tee -a "$OUT/digits.log"
train.py --kd True --precision fp16 --name fp16 $EXTRA
train.py --kd True --precision fp32 --optimizer sgd --name fp32_sgd $EXTRA
train.py --kd True --compile True --name compiled $EXTRA
test.py --kd True ${EXTRA/--num_epochs */}
test.py --tto True --soften 1 5 ${EXTRA/--num_epochs */}
test.py --kd True --export $RUNS/digits/student.pt2 ${EXTRA/--num_epochs */}
test.py --compare True ${EXTRA/--num_epochs */}
END
}

speed() { # kernels.py prints each row at once, throughput.py its table at its end
  within 120 $PYTHON tools/kernels.py ${PEAK:+--peak $PEAK} 2>&1 | tee "$OUT/kernels.log"
  within 150 $PYTHON benchmarks/throughput.py --quick --json "$OUT/throughput.json" | tee "$OUT/throughput.md"
}

for part in ${@:-resume cifar10 speed cifar100}; do
  ((SECONDS < LIMIT)) || break
  echo "=== $SECONDS s: $part, $($PYTHON -c 'import torch; print(torch.__version__, torch.cuda.is_available() and torch.cuda.get_device_name())')"
  case $part in
    cifar10) table cifar10 260 ;;
    cifar100) table cifar100 260 ;;
    resume | digits | speed) $part ;;
    *) echo "no part $part" ;;
  esac
done
echo "=== $SECONDS s: end"
