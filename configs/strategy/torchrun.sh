#!/bin/sh
# One or several nodes by torchrun, the same command on each; what follows are gqaprune's own arguments:
#   configs/strategy/torchrun.sh fit --config configs/llama3_8b.yaml --config configs/strategy/fsdp2.yaml
#   NODES=2 HEAD=node01 configs/strategy/torchrun.sh fit …
# PROCESSES is how many there are on each node, by default its GPUs; HEAD is a host name of the first node.
set -eu
if [ "${NODES:-1}" = 1 ]; then
    set -- --standalone --no-python gqaprune "$@"
else
    set -- --nnodes="$NODES" --rdzv-backend=c10d --rdzv-endpoint="$HEAD:29500" --no-python gqaprune "$@"
fi
exec torchrun --nproc-per-node="${PROCESSES:-gpu}" "$@" --trainer.num_nodes "${NODES:-1}"
