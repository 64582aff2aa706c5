#!/usr/bin/env bash
# Several machines: the same line on each of them, only NODE_RANK differs (0 on the one that MASTER_ADDR names).
#
#   NODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 bash scripts/launch/multi_node.sh recipes/pretrain.py --config run.yaml ...
#   NODES=2 NODE_RANK=1 MASTER_ADDR=10.0.0.1 bash scripts/launch/multi_node.sh recipes/pretrain.py --config run.yaml ...
#
# PROCESSES    processes on this machine; by default one for each GPU, the same on every machine
# MASTER_PORT  a free port there, reachable from the others; by default 29500
# INTERFACE    network interface of the traffic, such as eth0, where a machine has several (`ip -br addr` lists them)
#
# Code, environment and data must be the same everywhere; --output_dir must be one shared folder, rank 0 writes it.
set -euo pipefail

if [ $# -eq 0 ]; then
  echo "usage: NODES=n NODE_RANK=i MASTER_ADDR=address bash $0 recipes/<recipe>.py <flags>" >&2
  exit 2
fi
: "${NODES:?how many machines, the same number on each}"
: "${NODE_RANK:?the number of this machine, from 0 to NODES - 1}"
: "${MASTER_ADDR:?the address of machine 0, as the others reach it}"
if [ "$NODE_RANK" -ge "$NODES" ]; then
  echo "error: NODE_RANK=$NODE_RANK with NODES=$NODES: machines are numbered from 0 to $((NODES - 1))" >&2
  exit 2
fi
if [ -n "${INTERFACE:-}" ]; then
  export NCCL_SOCKET_IFNAME="$INTERFACE" GLOO_SOCKET_IFNAME="$INTERFACE"
fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

exec "${PYTHON:-python}" -m torch.distributed.run --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
  --nnodes "$NODES" --node-rank "$NODE_RANK" --nproc-per-node "${PROCESSES:-gpu}" \
  --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}" "$@"
