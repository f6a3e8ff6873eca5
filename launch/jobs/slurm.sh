# From here on the same for every job. Options of steps: torchrun joins the ranks (--mpi=none), which share the cores of
# their node (--cpu-bind=none); of a step that a lost node ended, Slurm may hold the rest for long (--overlap).

(( nodes * ranks_of_a_node == ranks )) || { echo "$nodes nodes of $ranks_of_a_node ranks are not $ranks ranks" >&2; exit 2; }
mapfile -t allocated < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
asked='' # the signal that asked this job to stop

# shellcheck disable=SC2317,SC2329  # traps call it
stop() { # ranks save and end
  asked=$1
  echo "asked to stop by SIG$1" >&2
  scancel --signal=TERM "$SLURM_JOB_ID" # of the step, not of this script
}
trap 'stop USR1' USR1
trap 'stop TERM' TERM

again() { # this job, from the queue; Slurm ends this script
  trap '' USR1 TERM
  echo "queues again: $1" >&2
  scontrol requeue "$SLURM_JOB_ID" || exit 1
  sleep 600
  exit 1
}

preempted() {
  [[ $(scontrol --oneliner show job "$SLURM_JOB_ID") =~ PreemptTime=[0-9] ]]
}

healthy() { # nodes that answer and pass the doctor, in the order of the allocation
  local up passed
  up=$(sinfo --responding --noheader --Node --nodes="$SLURM_JOB_NODELIST" --states=alloc,mix --format=%N | sort -u)
  [[ -n $up ]] || return
  passed=$(timeout 600 srun "${step[@]}" --no-kill --kill-on-bad-exit=0 --nodes="$(wc -l <<< "$up")" \
    --ntasks="$(wc -l <<< "$up")" --ntasks-per-node=1 --nodelist="$(paste -sd, <<< "$up")" \
    bash -c 'if said=$("$@" 2>&1); then echo "$SLURMD_NODENAME"; else echo "$said" >&2; fi' _ "$python" "${doctor[@]}")
  for node in "${allocated[@]}"; do
    if grep -qxF -- "$node" <<< "$passed"; then echo "$node"; fi
  done
}

start() { # one agent a node, on hosts; node i has ranks i * ranks_of_a_node and on
  local list port
  list=$(IFS=,; echo "${hosts[*]}")
  port=$((20000 + (SLURM_JOB_ID * 7 + attempt) % 20000)) # another each time: the last one may still be closing
  exec srun "${step[@]}" --label --kill-on-bad-exit=1 --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 \
    --nodelist="$list" bash -c '
      read -ra hosts <<< "$1"
      if [[ ${hosts[SLURM_NODEID]} != "$SLURMD_NODENAME" ]]; then
        echo "node $SLURM_NODEID is $SLURMD_NODENAME, and was to be ${hosts[SLURM_NODEID]}" >&2
        exit 2
      fi
      exec "$2" -m torch.distributed.run --node-rank "$SLURM_NODEID" "${@:3}"' \
    _ "${hosts[*]}" "$python" --nnodes "$nodes" --nproc-per-node "$ranks_of_a_node" --max-restarts 0 \
    --master-addr "${hosts[0]}" --master-port "$port" "${train[@]}"
}

printf '%s\n' "${place[@]}"
code=1
for ((attempt = 1; attempt <= attempts; attempt++)); do
  mapfile -t hosts < <(healthy)
  [[ -z $asked ]] || break
  echo "healthy: ${#hosts[@]} of ${#allocated[@]} nodes, $nodes are needed"
  if (( ${#hosts[@]} < nodes )); then
    (( ${SLURM_RESTART_COUNT:-0} >= requeues )) || again 'too few nodes are healthy'
    break
  fi
  hosts=("${hosts[@]:0:nodes}")
  for ((i = 0; i < nodes; i++)); do
    echo "node $i: ${hosts[i]}: ranks $((i * ranks_of_a_node)) to $(((i + 1) * ranks_of_a_node - 1))"
  done
  start &
  step_pid=$!
  code=0
  wait "$step_pid" || code=$?
  while kill -0 "$step_pid" 2> /dev/null; do # a signal ends a wait, not the step
    code=0
    wait "$step_pid" || code=$?
  done
  (( code != 0 )) || exit 0
  [[ -z $asked ]] || break
  if preempted; then again preempted; fi
  echo "attempt $attempt of $attempts ended with $code" >&2
done
[[ $asked != USR1 ]] || again 'the time limit is near'
exit "$code"
