# shellcheck shell=bash disable=SC2034
# What the launch scripts share: arguments, dry run, quoting. To be sourced;
# the scripts use the variables that nothing here reads.

if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 404)); then
  echo "error: bash 4.4 or newer is needed, this is $BASH_VERSION" \
    "(macOS: brew install bash)" >&2
  exit 1
fi

# What --dry-run prints goes here: stdout may be captured by $(...).
exec 3>&1

declare -A given=() # options by name, switches as "yes"
declare -a extra=() # what follows `--`
declare -a worker=() # what one host runs, see worker_command
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# The sourcing script's first comment is its help.
usage() { sed -n '2,${/^#/!q;s/^# \{0,1\}//p;}' "$0"; }

die() {
  echo "error: $*" >&2
  exit 1
}

misuse() {
  echo "error: $* (see ${0##*/} --help)" >&2
  exit 2
}

# parse "OPTIONS WITH A VALUE" "SWITCHES" ARGUMENTS...
# Fills `given` and `extra`; --key=value and --key value are the same.
parse() {
  local options=" $1 " switches=" $2 dry-run " key
  shift 2
  while (($#)); do
    key=${1#--} key=${key%%=*}
    if [[ $1 == --help || $1 == -h ]]; then
      usage
      exit 0
    elif [[ $1 == -- ]]; then
      shift
      extra=("$@")
      return
    elif [[ $1 != --* || $key == *[^a-z-]* ]]; then
      misuse "$(quoted "$1") is not an option"
    elif [[ $1 == "--$key" && $switches == *" $key "* ]]; then
      given[$key]=yes
    elif [[ $options != *" $key "* ]]; then
      misuse "unknown option $(quoted "$1")"
    elif [[ $1 == *=* ]]; then
      given[$key]=${1#*=}
    elif (($# > 1)) && [[ $2 != --* ]]; then
      given[$key]=$2
      shift
    else
      misuse "--$key needs a value"
    fi
    shift
  done
}

# subcommand "NAMES" FIRST...: sets `command`, which must be one of them.
subcommand() {
  command=${2:-}
  case $command in
    '') misuse "missing: a command, one of $1" ;;
    -h | --help)
      usage
      exit 0
      ;;
    *) [[ " $1 " == *" $command "* ]] ||
      misuse "$(quoted "$command") is no command, those are $1" ;;
  esac
}

has() { [[ -n ${given[$1]:-} ]]; }

# What a person watching wants to know; a dry run shows commands alone.
note() { has dry-run || echo "$*" >&2; }

# need NAME...: one line that names every option that is missing.
need() {
  local name missing=
  for name; do has "$name" || missing+=" --$name"; done
  [[ -z $missing ]] || misuse "missing:$missing"
}

# default NAME VALUE: for an option that was not given.
default() { has "$1" || given[$1]=$2; }

# whole NAME LEAST: refuses what is not a whole number of at least LEAST.
whole() {
  [[ ${given[$1]} =~ ^(0|[1-9][0-9]{0,8})$ && ${given[$1]} -ge $2 ]] ||
    misuse "--$1=${given[$1]} must be a whole number, $2 or more"
}

# config_in DIRECTORY: the config must be a file there; `:argument` may follow.
config_in() {
  [[ -f $1/${given[config]%%:*} || -f ${given[config]%%:*} &&
    ${given[config]} == /* ]] ||
    misuse "--config=${given[config]} is no file in $1"
}

# Machines come and go: what a run leaves must not lie on one of them.
lasting_workdir() {
  [[ ${given[workdir]} == gs://?* || ${given[workdir]} == /* ]] ||
    misuse "--workdir=${given[workdir]} must be gs://BUCKET/... or the" \
      "absolute path of a disk that every host mounts"
}

# worker_command PATH_TO_LOCAL_SH [OPTION...]: sets `worker`, the command of
# each host; the same on all of them.
worker_command() {
  worker=(bash "$1" --tries=1 "${@:2}" "--config=${given[config]}"
    "--workdir=${given[workdir]}" -- --multihost "${extra[@]}")
}

# The words on one line, to be read by bash again, here or on a worker.
quoted() {
  local word line=
  for word; do
    if [[ $word == '' || $word == *[^A-Za-z0-9_./:=,@%+-]* ]]; then
      word=${word@Q}
    fi
    line+=" $word"
  done
  printf '%s\n' "${line:1}"
}

# call COMMAND...: runs it, or prints it in a dry run; ends on its failure.
call() {
  if has dry-run; then
    quoted "$@" >&3
    return
  fi
  echo "+ $(quoted "$@")" >&2
  "$@" || failed $? "$@"
}

# feed TEXT COMMAND...: the same with TEXT on its standard input.
feed() {
  if has dry-run; then
    printf '%s <<%s\n%s\n%s\n' "$(quoted "${@:2}")" "'END'" "$1" END >&3
    return
  fi
  echo "+ $(quoted "${@:2}")" >&2
  "${@:2}" <<<"$1" || failed $? "${@:2}"
}

failed() {
  local status=$1 word what=
  shift
  ((status != 127)) || die "$1 is not installed, or not on PATH"
  for word in "${@:1:5}"; do
    [[ $word != -* ]] || break
    what+=" $word"
  done
  die "failed with status $status:$what ... (its own message is above)"
}

# confirm QUESTION: asks, unless --yes or a dry run.
confirm() {
  local answer=
  if has dry-run || has yes; then return; fi
  read -r -p "$1 [y/N] " answer || true
  [[ $answer == y || $answer == yes ]] ||
    die "not confirmed: nothing was done (--yes goes ahead without asking)"
}
