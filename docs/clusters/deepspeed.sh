#!/usr/bin/env bash
# Trains on several nodes under DeepSpeed's launcher.  With pdsh and ssh that asks for no password, on one node:
#
#     HOSTFILE=hosts docs/clusters/deepspeed.sh CONFIG [--section.field VALUE …]
#
# Without ssh, on every node, with the number of its line in the hostfile, from 0:
#
#     HOSTFILE=hosts FIRST=node-1 NODE_RANK=0 docs/clusters/deepspeed.sh CONFIG [--section.field VALUE …]
#
# HOSTFILE    a line a node, its name and its number of GPUs:   node-1 slots=8
# FIRST       the first of them, by a name or an address that all of them reach; with ssh it is found out
# PORT        of the meeting point                                                             (29500)
#
# The checkout, data.shards and out have the same paths on every node; out is shared by all of them.
# Every node of the file must join within engine.timeout_minutes.  Where nodes have several networks, name the one
# between them: export NCCL_SOCKET_IFNAME=eth1 GLOO_SOCKET_IFNAME=eth1; with ssh the launcher takes only NCCL_* along,
# so write GLOO_SOCKET_IFNAME=eth1 into .deepspeed_env, in the folder from where it is started.
#
# After a rank is lost the run ends on every node; the same command continues it.  To stop after a checkpoint, send
# SIGTERM to one of the train.py processes.
set -euo pipefail
top=$(cd "$(dirname "$0")/../.." && pwd)
PATH=$top/.venv/bin:$PATH

nodes=(--hostfile "${HOSTFILE:?names no file}" --master_port "${PORT:-29500}")
[ -z "${FIRST:-}" ] || nodes+=(--master_addr "$FIRST")
[ -z "${NODE_RANK:-}" ] || nodes+=(--no_ssh --node_rank "$NODE_RANK")
exec deepspeed --no_local_rank "${nodes[@]}" "$top/train.py" "$@"
