# shellcheck shell=bash
# What the jobs of this folder share: a batch script sets its defaults, sources this file and calls `launch`.
#
#   preflight -> rollout servers, until they answer -> trainers, one task a rank -> done, or saved and requeued
#
# It runs on the first node of the job, which is also the first trainer node. A function named ..._task runs in a job
# step on other nodes: its text travels in the command line, so that a container needs no copy of this file.
# Variables, log files and what happens when something fails: docs/guides/on-a-cluster.md.

INTERRUPTED=75 # exit code of a run that has saved and wants to be started again

say() { echo "$(date +%T) $*"; }

fail() {
    say "$*" >&2
    exit 1
}

# launch CONFIG [key=value ...]: the whole job. The caller's overrides come last, so they win.
launch() {
    local config=$1 address name
    shift
    # Not local: the functions below read them, and so does the trap at the end of the script.
    urls=() servers_at=() servers='' trainers='' time_is_up=''
    trap 'time_is_up=yes' USR1 # before the time limit, by #SBATCH --signal=B:USR1@...
    prepare_logs
    trap stop_servers EXIT

    mapfile -t nodes < <(scontrol show hostnames "${SLURM_JOB_NODELIST:?start this script with sbatch}")
    ((ROLLOUT_NODES < ${#nodes[@]})) ||
        fail "ROLLOUT_NODES=$ROLLOUT_NODES of ${#nodes[@]} nodes leaves none to train on: lower it, or use sbatch --nodes"
    trainer_nodes=("${nodes[@]:0:${#nodes[@]}-ROLLOUT_NODES}")
    rollout_nodes=("${nodes[@]:${#trainer_nodes[@]}}")
    # Below Linux' range for outgoing connections, and another one for every job, should two share a node.
    port=${MASTER_PORT:-$((10000 + SLURM_JOB_ID % 20000))}

    arguments=("--config-name=$config" "exp_manager.exp_dir=$RESULTS")
    arguments+=("trainer.num_nodes=${#trainer_nodes[@]}" "trainer.devices=$TRAINERS_PER_NODE")
    if [[ -n ${WANDB_API_KEY:-} ]]; then arguments+=(exp_manager.create_wandb_logger=true); fi
    arguments+=("${RECIPE_OVERRIDES[@]}")
    if ((ROLLOUT_NODES)); then
        for name in "${rollout_nodes[@]}"; do
            address=$(address_of "$name")
            servers_at+=("$name=$address")
            for ((i = 1; i <= SERVERS_PER_NODE; i++)); do urls+=("http://$address:$((port + i))"); done
        done
        arguments+=("rollout.servers=[$(join , "${urls[@]}")]" "rollout.vllm.api_key_file=$KEY_FILE")
    fi
    arguments+=("$@")

    say "job $SLURM_JOB_ID, start ${SLURM_RESTART_COUNT:-0}: trainers on $(join , "${trainer_nodes[@]}")" \
        "($TRAINERS_PER_NODE each), rollout servers on $(join , "${rollout_nodes[@]:-none of their own}")"
    say "image ${CONTAINER:-none}, logs in $LOGS"
    preflight
    if ((ROLLOUT_NODES)); then
        start_servers
        wait_for_servers
    fi
    if [[ -n $time_is_up ]]; then requeue "the time limit is near and training has not begun"; fi
    start_trainers
    watch_trainers
}

join() {
    local IFS=$1
    shift
    echo "$*"
}

# One folder a job, the same after a requeue; every node writes into it, so it must be on a shared file system.
prepare_logs() {
    LOGS=$SLURM_SUBMIT_DIR/logs/$SLURM_JOB_ID
    KEY_FILE=$LOGS/server_key
    SAVED_MARK=$LOGS/interrupted
    RANK_ZERO_PID=$LOGS/rank_0.pid
    mkdir -p "$LOGS"
    rm -f "$KEY_FILE" "$SAVED_MARK" "$RANK_ZERO_PID"
    (umask 077 && head -c 32 /dev/urandom | base64 | tr -d '/+=\n' >"$KEY_FILE")
}

# Where Slurm itself reaches a node: its name, or an address where the cluster's configuration gives one.
slurm_address_of() {
    local described
    described=$(scontrol show node "$1" --oneliner)
    [[ $described =~ NodeAddr=([^ ]+) ]] || fail "scontrol knows no address of $1"
    echo "${BASH_REMATCH[1]}"
}

# The same as an IPv4 address: a node may resolve its own name to a loopback address, and a server must not listen there.
address_of() {
    local found
    found=$(getent ahostsv4 "$(slurm_address_of "$1")") || fail "$1 has no IPv4 address"
    echo "${found%% *}"
}

# step_on LOG TASKS_PER_NODE NODE...: begins the array STEP, an srun command line. LOG - is the job's own log.
step_on() {
    local log=$1 tasks=$2 mounts
    shift 2
    # --kill-on-bad-exit: a dead task ends its step, so that nobody waits for it in a collective.
    # --ntasks: a step would inherit the job's. --cpu-bind=none: or every task gets a single core.
    STEP=(srun "--nodes=$#" "--ntasks=$(($# * tasks))" "--ntasks-per-node=$tasks" "--nodelist=$(join , "$@")")
    STEP+=(--kill-on-bad-exit=1 --cpu-bind=none --input=none)
    if [[ $log != - ]]; then STEP+=(--label --open-mode=append "--output=$LOGS/$log-%N.log"); fi
    if [[ -n ${CONTAINER:-} ]]; then
        mounts=$LOGS:$LOGS,${MOUNTS:?comma-separated SOURCE:TARGET folders that the container sees: data, models, results}
        if [[ -n ${HF_HOME:-} ]]; then mounts+=,$HF_HOME:$HF_HOME; fi
        STEP+=("--container-image=$CONTAINER" "--container-mounts=$mounts" --no-container-mount-home)
    fi
    local further
    read -ra further <<<"${SRUN_OPTIONS:-}"
    STEP+=("${further[@]}")
}

# run_function NAME ARGUMENT...: ends STEP with a function of this file.
run_function() {
    STEP+=(bash -c "$(declare -f "$1"); $1 \"\$@\"" "$@")
}

# ---- Preflight: one task on every node. All of them report before the job ends.

preflight() {
    step_on - 1 "${nodes[@]}"
    STEP+=(--kill-on-bad-exit=0)
    run_function preflight_task "$PYTHON" "$LOGS" "$GPUS_PER_NODE" $((${#trainer_nodes[@]} * TRAINERS_PER_NODE)) \
        "${arguments[@]}"
    say "preflight"
    "${STEP[@]}" || fail "preflight failed: the lines above say on which node and why"
}

preflight_task() {
    local python=$1 logs=$2 gpus=$3 world_size=$4 node=$SLURMD_NODENAME help code=0
    shift 4
    refuse() {
        echo "preflight failed on $node: $*" >&2
        exit 1
    }
    [[ -w $logs ]] || refuse "$logs is not there: submit from a folder that every node shares"
    local log=$logs/preflight-$node.log
    help=$("$python" -m nemo_jepo.cli --help 2>"$log") ||
        refuse "$python -m nemo_jepo.cli does not run: $(tail -n 1 "$log"); set PYTHON or CONTAINER"
    if ((gpus)); then
        ((gpus <= $(nvidia-smi --list-gpus 2>>"$log" | wc -l))) || refuse "nvidia-smi lists fewer than $gpus GPUs"
    fi
    if [[ $help != *" doctor "* ]]; then
        ((SLURM_PROCID)) || echo "preflight: nemo-jepo has no doctor command here, so its checks are skipped"
        return
    fi
    # COLUMNS: or its table is folded. That the servers do not answer yet is a warning, which only the log has.
    COLUMNS=1000 WORLD_SIZE=$world_size "$python" -m nemo_jepo.cli doctor "$@" >>"$log" 2>&1 || code=$?
    ((code == 0)) || refuse "the doctor found (exit code $code, $log):" \
        "$({ grep '^blocker' "$log" || tail -n 1 "$log"; } | tr -s ' ')"
}

# ---- Rollout servers.

start_servers() {
    step_on server "$SERVERS_PER_NODE" "${rollout_nodes[@]}"
    local options
    read -ra options <<<"$SERVER_OPTIONS"
    run_function server_task "${servers_at[*]}" "$port" "$SERVER_TENSOR_PARALLEL_SIZE" "$PYTHON" \
        "${MODEL:?folder of the Hugging Face model, for the rollout servers}" --api-key-file "$KEY_FILE" \
        --tensor-parallel-size "$SERVER_TENSOR_PARALLEL_SIZE" "${options[@]}"
    say "rollout servers: ${urls[*]}"
    "${STEP[@]}" &
    servers=$!
}

# One server, started again when it dies: it gets the current weights at the next sync. docs/guides/sample-with-vllm.md.
server_task() {
    local place addresses=$1 port=$(($2 + SLURM_LOCALID + 1)) gpus=$3 python=$4 model=$5 host='' stopped='' code visible
    shift 5
    for place in $addresses; do
        if [[ ${place%%=*} == "$SLURMD_NODENAME" ]]; then host=${place#*=}; fi
    done
    # Counted among those that Slurm shows this task, where it shows fewer than the node has.
    IFS=, read -ra visible <<<"${CUDA_VISIBLE_DEVICES:-$(seq -s, 0 $((SLURM_LOCALID * gpus + gpus - 1)))}"
    CUDA_VISIBLE_DEVICES=$(IFS=, && echo "${visible[*]:SLURM_LOCALID * gpus:gpus}")
    export CUDA_VISIBLE_DEVICES
    trap 'stopped=yes' TERM
    for _ in 1 2 3 4 5; do
        code=0
        "$python" -m nemo_jepo.cli serve "$model" --host "$host" --port "$port" "$@" || code=$?
        if [[ -n $stopped ]] || ((code == 0)); then exit 0; fi
        echo "the server http://$host:$port ended with exit code $code"
        if ((code == 2)); then exit 2; fi # a setting to change
        sleep 5
    done
    exit 1
}

wait_for_servers() {
    local deadline=$((SECONDS + SERVER_TIMEOUT)) silent=("${urls[@]}") url
    while ((${#silent[@]})) && [[ -z $time_is_up ]]; do
        silent=()
        for url in "${urls[@]}"; do answers "$url" || silent+=("$url"); done
        if ! kill -0 "$servers" 2>/dev/null; then fail "a rollout server does not start: see $LOGS/server-*.log"; fi
        ((SECONDS < deadline)) || fail "no answer within $SERVER_TIMEOUT s from ${silent[*]}: see $LOGS/server-*.log"
        if ((${#silent[@]})); then sleep 2; fi
    done
    say "every rollout server answers"
}

# Whether GET /health of http://HOST:PORT answers 200. No curl: a proxy of the environment would stand between.
# shellcheck disable=SC2016 # the inner shell expands them
answers() {
    timeout 5 bash -c 'exec 3<>"/dev/tcp/${1%:*}/${1#*:}" && printf "GET /health HTTP/1.0\r\n\r\n" >&3 &&
        IFS= read -r status <&3 && [[ $status == *" 200 "* ]]' answers "${1#http://}" 2>/dev/null
}

# By scancel and not by a signal to srun, which would kill them without giving them time to clear up.
stop_servers() {
    rm -f "${KEY_FILE:-}"
    if [[ -z ${servers:-} ]] || ! kill -0 "$servers" 2>/dev/null; then return; fi
    scancel --signal=TERM "$SLURM_JOB_ID.1" 2>/dev/null || true # the job's second step; preflight is step 0
    for ((i = 0; i < 40; i++)); do
        if ! kill -0 "$servers" 2>/dev/null; then return; fi
        sleep 1
    done
    kill -TERM "$servers" 2>/dev/null || true
}

# ---- Trainers.

start_trainers() {
    step_on trainer "$TRAINERS_PER_NODE" "${trainer_nodes[@]}"
    run_function trainer_task "$(slurm_address_of "${trainer_nodes[0]}")" "$port" "$LOGS" "$INTERRUPTED" \
        "$PYTHON" -m nemo_jepo.cli train "${arguments[@]}"
    say "trainers: ${arguments[*]}"
    "${STEP[@]}" &
    trainers=$!
}

# One rank, with torchrun's variables from Slurm's: a static rendezvous, rank 0 on the first node.
trainer_task() {
    export MASTER_ADDR=$1 MASTER_PORT=$2 RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
    # Megatron's overlap needs the order of a single queue; vLLM's servers want several, so it is set for ranks alone.
    # Segments that grow: sync, score and update each cut memory into other pieces.
    export CUDA_DEVICE_MAX_CONNECTIONS=1 PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
    local logs=$3 interrupted=$4 code=0
    shift 4
    trap : TERM # the rank below gets it too, and this shell waits until it has saved
    (
        trap '' USR1 # a rank that is still starting would die of it
        if ((RANK == 0)); then echo "$BASHPID" >"$logs/rank_0.pid"; fi
        exec "$@"
    ) || code=$?
    # 128 + 10: USR1 came when Python was already ending, after the save, and had its default action again.
    if ((code == interrupted || code == 138)); then
        # Exit code 0, or the first rank to leave would have the others killed while they still close their files.
        if ((RANK == 0)); then : >"$logs/interrupted"; fi
        code=0
    fi
    # Slurm ended this rank because another one had died: srun reports the highest exit code, which is to be that one's.
    if ((code == 143)); then code=1; fi
    exit "$code"
}

# Wait for the end; meanwhile pass USR1 on to rank 0 alone, which stops all ranks after the same step. Slurm's own way
# would signal every process of the step: vLLM's servers, W&B's service and others that die of it.
watch_trainers() {
    local code=0 next_signal=0 servers_ended=''
    while kill -0 "$trainers" 2>/dev/null; do
        if [[ -z $servers_ended && -n $servers ]] && ! kill -0 "$servers" 2>/dev/null; then
            say "the rollout servers ended (see $LOGS/server-*.log), so the run saves and the job ends" >&2
            servers_ended=yes
        fi
        if [[ -n $time_is_up$servers_ended ]] && ((SECONDS >= next_signal)); then
            if ((next_signal == 0)); then say "the run is asked to finish its step and to save"; fi
            kill -USR1 "$(<"$RANK_ZERO_PID")" 2>/dev/null || true # and again: a rank that is still starting ignores it
            next_signal=$((SECONDS + 2))
        fi
        sleep 1
    done
    trap '' USR1 # or `wait` would report the signal in place of the run's exit code
    wait "$trainers" || code=$?
    if ((code)); then fail "the trainers ended with exit code $code: see $LOGS/trainer-*.log"; fi
    if [[ -e $SAVED_MARK && -n $servers_ended ]]; then
        fail "the run has saved; submit it again when the servers' failure is understood"
    fi
    if [[ -e $SAVED_MARK ]]; then requeue "the run has saved"; fi
    say "done: $RESULTS"
}

# The job from its beginning, under the same number and with the same logs; the run resumes from its last checkpoint.
requeue() {
    say "$1; the job goes back into the queue"
    if ((${SLURM_RESTART_COUNT:-0} >= MAX_RESTARTS)); then
        fail "it has been started again $MAX_RESTARTS times (MAX_RESTARTS): submit it once more to go on"
    fi
    stop_servers
    scontrol requeue "$SLURM_JOB_ID" || say "Slurm does not requeue it: submit it once more to go on" >&2
    sleep 30 # until Slurm ends this script
    exit "$INTERRUPTED"
}

# ---- Defaults, after everything that the batch script or the environment has set.

: "${SLURM_JOB_ID:?start this script with sbatch}"
: "${PROJECT_DIR:=$SLURM_SUBMIT_DIR}"
: "${RESULTS:=$SLURM_SUBMIT_DIR/results}"
: "${GPUS_PER_NODE:=0}"
: "${TRAINERS_PER_NODE:=${GPUS_PER_NODE}}"
: "${ROLLOUT_NODES:=0}"
: "${SERVER_TENSOR_PARALLEL_SIZE:=1}"
: "${SERVERS_PER_NODE:=1}"
: "${SERVER_OPTIONS:=}"
: "${SERVER_TIMEOUT:=1800}"
: "${MAX_RESTARTS:=100}"
if [[ -z ${PYTHON:-} ]]; then
    if [[ -n ${CONTAINER:-} ]]; then PYTHON=python3; else PYTHON=$PROJECT_DIR/.venv/bin/python; fi
fi
