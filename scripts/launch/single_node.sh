#!/usr/bin/env bash
# One machine, all of its GPUs (or PROCESSES of them; on a CPU give PROCESSES and --use_cpu):
#
#   bash scripts/launch/single_node.sh recipes/pretrain.py --config run.yaml --output_dir runs/clip
#   PROCESSES=2 bash scripts/launch/single_node.sh recipes/pretrain.py --config run.yaml --output_dir runs/clip --use_cpu
#
# The batch size of a recipe is that of one process; negatives come from all of them.
set -euo pipefail

if [ $# -eq 0 ]; then
  echo "usage: [PROCESSES=n] bash $0 recipes/<recipe>.py <flags>" >&2
  exit 2
fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"  # threads of each process; more help where a process decodes much

exec "${PYTHON:-python}" -m torch.distributed.run --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
  --standalone --nproc-per-node "${PROCESSES:-gpu}" "$@"
