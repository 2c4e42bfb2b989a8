# shellcheck shell=bash
# What the training jobs share: steps that pass signals on, the pre-flight, and what becomes of the job when a step ends.
# Sourced by the sbatch scripts after their block; the operator's page is slurm/README.md.
#
# USR1 to the batch shell (Slurm, when the time limit is near): checkpoint, then requeue. USR2 or TERM: checkpoint and end.
# Every attempt that completed no new step counts: after A3PO_MAX_ATTEMPTS of them in a row the job stops for a person.

ASKED=   # what a signal asked for: continue or end
HEARD=   # set by every signal: the wait it interrupted has to be taken up again
STEP=    # pid of the srun under way
RUN_DIR=
BEGAN_AT=0
trap 'hear continue' USR1
trap 'hear end' USR2 TERM

ATTEMPT=$((${SLURM_RESTART_COUNT:-0} + 1))
MAX_ATTEMPTS=${A3PO_MAX_ATTEMPTS:-3}
# A task of an array by its number: the last one's SLURM_JOB_ID is that of the whole array.
SELF=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
SELF=${SELF:-$SLURM_JOB_ID}
JOB_LOGS=${A3PO_LOGS:-$SLURM_SUBMIT_DIR/runs/slurm}/job-$SLURM_JOB_ID
LOGS=$JOB_LOGS/attempt-$ATTEMPT
WITHIN_MINUTES=10                   # a step of the pre-flight, which may have to fetch a container first
TOGETHER_S=${A3PO_TOGETHER_S:-180}  # from a step's first task that ends to its last
EXPORTED=$(IFS=,; echo "${ENVIRONMENT[*]},MASTER_ADDR,OMP_NUM_THREADS")

# With servers, servers.sh says what these do.
start_servers() { :; }
end_servers() { :; }

say() { printf '%s job %s attempt %s: %s\n' "$(date +%FT%T)" "$SLURM_JOB_ID" "$ATTEMPT" "$*"; }

hear() {
    HEARD=1
    say "asked to stop, then to $1"
    # An end outlasts a later wish to continue: scancel's TERM may come after the time limit's USR1.
    if [[ $ASKED != end ]]; then ASKED=$1; fi
    if [[ -n $STEP ]]; then kill -USR1 "$STEP" 2>/dev/null; fi
}

# step OPTION... -- COMMAND...: a job step to its end, whatever signals come meanwhile; its exit code.
step() {
    local options=()
    while [[ $1 != -- ]]; do options+=("$1"); shift; done
    shift
    # No kill on a bad exit: the ranks end together, rank 0 last, once its rollouts are down. A task that is still there
    # long after the first hangs, and would hold the step for ever.
    srun --export="$EXPORTED" --kill-on-bad-exit=0 --wait="$TOGETHER_S" --unbuffered "${STEP_OPTIONS[@]}" "${options[@]}" "$@" &
    heed $!
}

# alone OPTION... -- COMMAND...: a step of one task, on the first of the nodes chosen.
alone() { step --nodes=1 --ntasks=1 --nodelist="${NODES%%,*}" "$@"; }

# heed PID: an srun to its end; signals that come meanwhile are passed on to it. Its exit code.
heed() {
    local status=0
    STEP=$1
    if [[ -n $ASKED ]]; then kill -USR1 "$STEP"; fi
    while :; do
        HEARD=
        wait "$STEP" && status=0 || status=$?
        if [[ -z $HEARD ]]; then break; fi
    done
    STEP=
    return "$status"
}

# begin CONFIG [key=value ...]: test the nodes, check the arguments, find the run directory, note the attempt.
begin() {
    ARGUMENTS=("$@")
    NUM_OTHERS=${SERVER_NODES:-0}
    NUM_NODES=$((SLURM_JOB_NUM_NODES - NUM_OTHERS - ${SPARE_NODES:-0}))
    mkdir -p "$LOGS" || finish 3 "cannot write to $LOGS: set A3PO_LOGS to a folder that every node sees"
    touch "$JOB_LOGS/attempts"
    if ((NUM_NODES < 1)); then
        finish 2 "A3PO_SPARE_NODES=${SPARE_NODES:-0} and A3PO_SERVER_NODES=$NUM_OTHERS leave the trainer no node of $SLURM_JOB_NUM_NODES: more --nodes"
    fi
    if [[ " $* " == *" --resume"[\ =]"never "* ]]; then
        finish 2 "--resume never would begin anew at every attempt: move the old run aside by hand, or give another run_dir=..."
    fi
    test_nodes
    local status=0 plan
    if [[ -n $ASKED ]]; then after 75 "stopped before it began"; fi
    alone --output="$LOGS/plan.yaml" --error="$LOGS/plan.err" -- \
        "$PYTHON" -m megatron_a3po train --dry-run "$@" || status=$?
    if [[ -n $ASKED ]]; then after 75 "stopped before it began"; fi
    if ((status)); then
        cat "$LOGS/plan.err"
        if ((status == 2)); then finish 2 "the configuration is wrong"; fi
        finish 3 "the plan of the run failed with code $status: needs a person (see $LOGS/plan.err)"
    fi
    plan=$(sed -n "s/^run_dir: //p" "$LOGS/plan.yaml")
    RUN_DIR=${plan//[\'\"]/}
    BEGAN_AT=$(completed_steps)
    say "begins on $SLURM_JOB_NODELIST at step $BEGAN_AT of $RUN_DIR; logs in $LOGS"
    # A node failure ends an attempt without a word, so attempts are counted when they begin.
    if (($(fruitless "$BEGAN_AT") >= MAX_ATTEMPTS)); then
        finish 3 "$MAX_ATTEMPTS attempts in a row have completed no step after $BEGAN_AT: needs a person"
    fi
    echo "$BEGAN_AT" >>"$JOB_LOGS/attempts"
    meet
    if ((ATTEMPT > 1)); then take_over; fi
}

# A node that was cut off may still run the attempt before, which Slurm has given up: it stops before this one begins.
take_over() {
    local status=0
    alone --output="$LOGS/take-over.log" -- \
        "$PYTHON" -m megatron_a3po.trainer.take_over "$RUN_DIR" || status=$?
    cat "$LOGS/take-over.log"
    if [[ -n $ASKED ]]; then after 75 "stopped before it began"; fi
    case $status in
        0) ;;
        3) finish 3 "the attempt before has not stopped: needs a person" ;;
        *) after "$status" "taking over from the attempt before: $(words "$status")" ;;
    esac
}

# How far the run has ever come; steps that are done again are no progress.
completed_steps() {
    local furthest
    furthest=$(grep -o '^{"step": [0-9]*' "$RUN_DIR/metrics.jsonl" 2>/dev/null | grep -o '[0-9]*$' | sort -n | tail -n 1)
    echo "${furthest:-0}"
}

# The number of latest attempts in a row that began at this step.
fruitless() {
    awk -v step="$1" '{ count = $1 == step ? count + 1 : 0 } END { print count + 0 }' "$JOB_LOGS/attempts"
}

# Sets GOOD to the nodes that pass the pre-flight, and NODES to those to run on, comma-separated.
test_nodes() {
    local wanted=$((NUM_NODES + NUM_OTHERS)) folder=$LOGS/preflight status=0 reports=() seconds node
    local within=60  # seconds until network file systems show every report; those of failed tasks will never come
    mapfile -t GOOD < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    NODES=$(IFS=,; echo "${GOOD[*]:0:wanted}")
    if [[ ${A3PO_PREFLIGHT:-1} != 1 || -n $ASKED ]]; then return; fi
    rm -rf "$folder"
    mkdir -p "$folder"
    step --time="$WITHIN_MINUTES" --nodes="${#GOOD[@]}" --ntasks-per-node=1 --ntasks="${#GOOD[@]}" \
        --output="$LOGS/%n-%N-preflight.log" -- "$PYTHON" -m megatron_a3po.trainer.preflight report "$folder" || within=5
    if [[ -n $ASKED ]]; then return; fi
    for ((seconds = 0; seconds < within; seconds++)); do
        reports=("$folder"/*.json)
        if [[ -e ${reports[0]} ]]; then break; fi
        sleep 1
    done
    if [[ ! -e ${reports[0]} ]]; then finish 3 "no node passed the pre-flight: needs a person (see $LOGS)"; fi
    node=${reports[0]##*/}  # the first node may be a bad one
    step --time="$WITHIN_MINUTES" --nodes=1 --ntasks=1 --nodelist="${node%.json}" --output="$LOGS/preflight.log" -- \
        "$PYTHON" -m megatron_a3po.trainer.preflight judge "$folder" --wanted "$wanted" --within "$within" "${GOOD[@]}" ||
        status=$?
    cat "$LOGS/preflight.log"
    if [[ -n $ASKED ]]; then return; fi
    if ((status)); then finish 3 "too few nodes passed the pre-flight: needs a person (see $LOGS)"; fi
    IFS=, read -ra GOOD <"$folder/good"
    NODES=$(IFS=,; echo "${GOOD[*]:0:wanted}")
}

# The chosen nodes share the run directory and reach each other; those that do not are left out, once, for spare ones.
meet() {
    local wanted=$((NUM_NODES + NUM_OTHERS)) folder=$RUN_DIR/preflight/job-$SLURM_JOB_ID-attempt-$ATTEMPT try status bad
    if [[ ${A3PO_PREFLIGHT:-1} != 1 ]]; then return; fi
    for try in 1 2; do
        if [[ -n $ASKED ]]; then after 75 "stopped before it began"; fi
        status=0
        step --time="$WITHIN_MINUTES" --nodes="$wanted" --nodelist="$NODES" --ntasks-per-node=1 --ntasks="$wanted" \
            --output="$LOGS/meet-$try-%t.log" -- "$PYTHON" -m megatron_a3po.trainer.preflight meet \
            "$(address_of "${NODES%%,*}")" "$folder" "$NODES" --within $((TOGETHER_S * 2 / 3)) || status=$?
        if ((status == 0)) || [[ -n $ASKED ]]; then return; fi
        # The first task knows who did not come; the others only whether the first did.
        bad=$(grep -h '^bad node' "$LOGS/meet-$try-0.log" || grep -h '^bad node' "$LOGS/meet-$try"-*.log)
        sort -u <<<"$bad"
        mapfile -t GOOD < <(printf '%s\n' "${GOOD[@]}" | grep -vxFf <(sed -n 's/^bad node \([^:]*\):.*/\1/p' <<<"$bad"))
        if ((${#GOOD[@]} < wanted)); then break; fi
        NODES=$(IFS=,; echo "${GOOD[*]:0:wanted}")
    done
    finish 3 "too few nodes share $RUN_DIR and reach each other: needs a person (see $LOGS)"
}

# run_training TASKS_PER_NODE: servers where there are any, then the ranks; ends the script.
run_training() {
    local tasks=$1 status=0 cpus=() chosen=()
    IFS=, read -ra chosen <<<"$NODES"
    NODES=$(IFS=,; echo "${chosen[*]:0:NUM_NODES}")
    MASTER_ADDR=$(address_of "${NODES%%,*}")
    export MASTER_ADDR
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    # srun does not take this one from sbatch.
    if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then cpus=(--cpus-per-task="$SLURM_CPUS_PER_TASK"); fi
    if [[ -z $ASKED ]]; then
        start_servers "$(IFS=,; echo "${chosen[*]:NUM_NODES}")"
        say "runs on $NODES"
        step --nodes="$NUM_NODES" --nodelist="$NODES" --ntasks-per-node="$tasks" --ntasks=$((NUM_NODES * tasks)) "${cpus[@]}" \
            "${TRAINER_OPTIONS[@]}" --output="$LOGS/%n-%N-rank-%t.log" -- \
            "$PYTHON" -m megatron_a3po train "${ARGUMENTS[@]}" || status=$?
    else
        status=75
    fi
    # A signal in the first moments of a task, before it listens, ends it by that signal (128 + 10): nothing had begun.
    if [[ -n $ASKED ]] && ((status == 138)); then status=75; fi
    # srun that lost a node may end well.
    if ((status == 0)) && [[ ! -f $RUN_DIR/summary.json ]]; then status=1; fi
    if ((status)); then grep -h '^the ranks have waited' "$LOGS"/*-rank-*.log | sort -u; fi
    after "$status" "$(words "$status")"
}

# A node's name need not resolve on the others.
address_of() { control show node -o "$1" | grep -o 'NodeAddr=[^ ]*' | cut -d= -f2; }

words() {
    case $1 in
        0) echo "done" ;;
        2) echo "configuration or input is wrong; the sentences are in $LOGS" ;;
        3) echo "needs a person: why is in the last lines of $RUN_DIR/logs/rank-0.log" ;;
        70) echo "a rank crashed, or did not come; why is at the end of its log in $RUN_DIR/logs" ;;
        75) echo "stopped early" ;;
        130) echo "interrupted" ;;
        *) if (($1 > 128)); then echo "a task was ended by signal $(($1 - 128))"; else echo "ended with code $1"; fi ;;
    esac
}

# control ARGUMENT...: what scontrol says; a controller that is busy or away is asked again, for two minutes.
control() {
    local said
    for _ in {1..24}; do
        if said=$(scontrol "$@" 2>&1); then echo "$said"; return; fi
        case $said in *Invalid* | *denied* | *disabled*) break ;; esac
        sleep 5
    done
    echo "$said" >&2
    return 1
}

# after STATUS WORDS: what becomes of the job once a step has ended so.
after() {
    local status=$1 what=$2
    if ! is_mine; then finish "$status" "$what; Slurm has ended this attempt ($STATE)"; fi
    case $status in
        0 | 2 | 3 | 130) finish "$status" "$what" ;;
    esac
    if [[ $ASKED == end ]]; then finish "$status" "$what; asked to end, so it does not continue: submit it again to continue"; fi
    if (($(completed_steps) == BEGAN_AT && $(fruitless "$BEGAN_AT") >= MAX_ATTEMPTS)); then
        finish 3 "$what; $MAX_ATTEMPTS attempts in a row have completed no step after $BEGAN_AT: needs a person"
    fi
    say "$what; continues as attempt $((ATTEMPT + 1))"
    end_servers
    requeue "$status"
}

# requeue STATUS: end this attempt for the next; with STATUS where that cannot be.
requeue() {
    # Slurm ends this script while it waits; otherwise it would fall through to its end.
    trap - USR1 USR2 TERM
    if control requeue "$SELF"; then
        for _ in {1..120}; do sleep 1; done
    fi
    finish "$1" "could not be requeued: submit it again to continue"
}

# Whether the job still runs as this attempt: a cancelled one, or one that runs elsewhere already, is not to be touched.
is_mine() {
    local record restarts
    record=$(control show job -o "$SELF") || { STATE=unknown; return 1; }
    record=${record%%$'\n'*}   # of a heterogeneous job the first component
    STATE=$(grep -o 'JobState=[A-Z_]*' <<<"$record" | cut -d= -f2)
    restarts=$(grep -o 'Restarts=[0-9]*' <<<"$record" | cut -d= -f2)
    [[ $STATE == RUNNING && $restarts == "${SLURM_RESTART_COUNT:-0}" ]]
}

finish() {
    end_servers
    say "$2 (exit code $1)"
    exit "$1"
}
