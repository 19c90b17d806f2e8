#!/usr/bin/env bash
# launch_ranks.sh COUNT PORT COMMAND...: COUNT ranks of a command on this machine. It ends when all have, with
# the exit code of the lowest rank that failed.
export WORLD_SIZE=$1 LOCAL_WORLD_SIZE=$1 MASTER_ADDR=127.0.0.1 MASTER_PORT=$2
shift 2
ranks=()
for ((rank = 0; rank < WORLD_SIZE; rank++)); do
  RANK=$rank LOCAL_RANK=$rank "$@" &
  ranks+=($!)
done
code=0
for process in "${ranks[@]}"; do # `wait -n` may miss one that has ended before
  wait "$process" || code=$((code ? code : $?))
done
exit "$code"
