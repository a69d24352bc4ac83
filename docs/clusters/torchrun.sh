#!/usr/bin/env bash
# Trains on several nodes under torchrun.  The same command on every node, in any order, within ten minutes:
#
#     FIRST=node-1 NODES=2 GPUS=8 docs/clusters/torchrun.sh CONFIG [--section.field VALUE …]
#
# FIRST      one of the nodes, by a name or an address that all of them reach; the ranks meet there
# NODES      how many nodes there are
# GPUS       processes on this node, one a GPU; the same on every node
# PORT       of the meeting point                                                              (29400)
# RESTARTS   how often all ranks are started again, from the last checkpoint, after one is lost     (3)
# ADDRESS    this node's own address, where the others do not find it by its host name
#
# The checkout, data.shards and out have the same paths on every node; out is shared by all of them.
# Where nodes have several networks, name the one between them: export NCCL_SOCKET_IFNAME=eth1 GLOO_SOCKET_IFNAME=eth1
#
# A lost rank: torchrun starts all ranks again.  A lost node: the others wait ten minutes for it; type the command there
# again.  A lost FIRST: type it everywhere.  Ranks notice by themselves what is lost without a word, such as a cable,
# after engine.timeout_minutes.  To stop after a checkpoint, send SIGTERM to torchrun on every node, not to its ranks,
# which it would start again.
set -euo pipefail
top=$(cd "$(dirname "$0")/../.." && pwd)
PATH=$top/.venv/bin:$PATH

meeting=(--rdzv-backend c10d --rdzv-endpoint "${FIRST:?names no node}:${PORT:-29400}" --rdzv-id maestri)
if [ -n "${ADDRESS:-}" ]; then
    is_host=0
    [ "$ADDRESS" != "$FIRST" ] || is_host=1
    meeting+=(--local-addr "$ADDRESS" --rdzv-conf "is_host=$is_host")
fi
exec torchrun --nnodes "${NODES:?is not given}" --nproc-per-node "${GPUS:?is not given}" --max-restarts "${RESTARTS:-3}" "${meeting[@]}" \
    "$top/train.py" "$@"
