# shellcheck shell=bash disable=SC2034
# vLLM servers beside a trainer: a second step in the background of the job, whose tasks register in RUN_DIR/servers,
# where the run looks for them (and where a pool, pool.sbatch, adds others). Sourced after job.sh, by the scripts whose
# block has SERVER_PYTHON, SERVER_ENVIRONMENT, SERVER_OPTIONS and SERVER_ARGUMENTS.

SERVERS_STEP=      # pid of the srun they run under
WITHIN_S=90        # they have to end once they are asked to; what they still answer is cut off after 15 s

# The keys of a run whose servers register in FOLDER.
registered() {
    OVERRIDES=(rollout.engine=vllm rollout.launch=null rollout.servers=null rollout.vllm_python=null "rollout.servers_file=$1")
}

# begin_with_servers CONFIG [key=value ...]: as begin; then the folder, its token and how servers are started.
begin_with_servers() {
    local config=${1:?give a configuration} argument plain=() status=0
    shift
    registered registered   # where is known once the run directory is
    begin "$config" "${OVERRIDES[@]}" "$@"
    registered "$RUN_DIR/servers"
    ARGUMENTS=("$config" "${OVERRIDES[@]}" "rollout.token_file=$RUN_DIR/servers/token" "$@")
    mkdir -p "$RUN_DIR/servers" || finish 3 "cannot write to $RUN_DIR: give another run_dir=..."
    if [[ ! -s $RUN_DIR/servers/token ]]; then
        (umask 077 && head -c 32 /dev/urandom | base64 | tr -d '/+=\n' >"$RUN_DIR/servers/token")
    fi
    forget_servers
    for argument in "${ARGUMENTS[@]:1}"; do
        if [[ $argument == [!-]*=* ]]; then plain+=("$argument"); fi
    done
    alone --output="$LOGS/recipe.json" --error="$LOGS/recipe.err" -- \
        "$PYTHON" -m megatron_a3po.rollout.vllm.recipe "$config" "$RUN_DIR/servers/token" "${plain[@]}" || status=$?
    if [[ -n $ASKED ]]; then after 75 "stopped before it began"; fi
    if ((status)); then cat "$LOGS/recipe.err"; finish 3 "how servers are started could not be told: needs a person"; fi
    cp "$LOGS/recipe.json" "$RUN_DIR/servers/recipe.tmp" && mv "$RUN_DIR/servers/recipe.tmp" "$RUN_DIR/servers/recipe.json"
}

# Of this job's earlier attempts servers are fenced off, should one be alive; of jobs that are over nothing is left.
forget_servers() {
    local file job
    for file in "$RUN_DIR"/servers/job-*.attempt; do
        if [[ ! -e $file ]]; then continue; fi
        job=${file##*/job-}
        job=${job%-*}
        if [[ $job == "$SLURM_JOB_ID" ]]; then
            echo "$ATTEMPT" >"$file.tmp" && mv "$file.tmp" "$file"
            rm -f "${file%.attempt}.url"
        elif [[ -z $(squeue --noheader --states=RUNNING,SUSPENDED --jobs="$job" 2>/dev/null) ]]; then
            rm -f "${file%.attempt}".*
        fi
    done
}

# start_servers [NODE,...]: on those nodes, or where SERVERS_ON says, or on the trainer's first.
start_servers() {
    if ((SERVERS_PER_NODE == 0)); then return; fi
    local on=("${SERVERS_ON[@]}") num_nodes=${SLURM_JOB_NUM_NODES_HET_GROUP_1:-1} num_servers
    if [[ -n ${1:-} ]]; then
        num_nodes=$(tr ',' '\n' <<<"$1" | wc -l)
        on=(--nodelist="$1")
    elif ((${#on[@]} == 0)); then
        on=(--nodelist="${NODES%%,*}")
    fi
    num_servers=$((num_nodes * SERVERS_PER_NODE))
    say "starts vLLM servers: $num_servers on $num_nodes nodes"
    launch_servers "job-$SLURM_JOB_ID" "${on[@]}" --nodes="$num_nodes" --ntasks="$num_servers" --ntasks-per-node="$SERVERS_PER_NODE"
}

# launch_servers NAME OPTION...: a step of servers in the background; each registers as NAME-<number>.
launch_servers() {
    local name=$1 plugin=$HOME_DIR/megatron_a3po/rollout/vllm/plugin exported
    shift
    A3PO_ADDRESSES=$(control show node -o "${SLURM_JOB_NODELIST_HET_GROUP_1:-$SLURM_JOB_NODELIST}" | sed -n 's/^NodeName=\([^ ]*\).* NodeAddr=\([^ ]*\).*/\1=\2/p' | tr '\n' ' ')
    A3PO_SERVER_PYTHON=$SERVER_PYTHON
    export A3PO_ADDRESSES A3PO_SERVER_PYTHON
    exported=$(IFS=,; echo "${SERVER_ENVIRONMENT[*]},A3PO_ADDRESSES,A3PO_SERVER_PYTHON,PYTHONPATH=$plugin")
    srun --export="$exported" --kill-on-bad-exit=0 --wait=0 --unbuffered "$@" "${SERVER_OPTIONS[@]}" \
        --output="$LOGS/%n-%N-server-%t.log" \
        bash "$HOME_DIR/slurm/server.sh" "$RUN_DIR" "$name" "$ATTEMPT" "${SERVER_ARGUMENTS[@]}" &
    SERVERS_STEP=$!
}

# Ask the servers to end, and wait for it: they take their files away and finish what they were asked.
end_servers() {
    if [[ -z $SERVERS_STEP ]]; then return; fi
    local seconds pid=$SERVERS_STEP
    SERVERS_STEP=
    kill -USR1 "$pid" 2>/dev/null   # srun passes it on to its tasks
    for ((seconds = 0; seconds < WITHIN_S; seconds++)); do
        if ! kill -0 "$pid" 2>/dev/null; then say "the servers have ended"; return; fi
        sleep 1
    done
    say "the servers did not end within $WITHIN_S s: they are killed"
    kill -TERM "$pid" 2>/dev/null
    wait "$pid"
}

# serve_until_asked NAME: a job that is nothing but servers, to its end; ends the script.
serve_until_asked() {
    local status=0
    say "starts a server for $RUN_DIR"
    launch_servers "$1" --nodes=1 --ntasks=1
    heed "$SERVERS_STEP" || status=$?
    SERVERS_STEP=
    if [[ $ASKED == continue && ! -f $RUN_DIR/summary.json ]] && is_mine; then
        say "near its time limit: continues as attempt $((ATTEMPT + 1))"
        requeue "$status"
    fi
    case $status in
        0) finish 0 "the server has ended: it was asked to, or the run is done" ;;
        3) finish 3 "needs a person: why is in $LOGS" ;;
        *) finish "$status" "$(words "$status")" ;;
    esac
}
