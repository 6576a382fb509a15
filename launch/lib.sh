# Sourced by the scripts of this folder that start runs elsewhere: flags, --help, --dry-run.
# shellcheck shell=bash

# Prints what stands at the top of the script.
usage() {
  sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
}

refuse() {
  echo "error: $*" >&2
  echo "See --help." >&2
  exit 2
}

# parse_flags "name other-name" "$@" sets NAME and OTHER_NAME from --name=value or --name value,
# DRY_RUN from --dry-run, and EXTRA from what stands after --.
parse_flags() {
  local known="$1" name value
  shift
  DRY_RUN=false
  EXTRA=()
  while (($#)); do
    case "$1" in
      --help | -h)
        usage
        exit 0
        ;;
      --dry-run) DRY_RUN=true && shift && continue ;;
      --)
        shift
        EXTRA=("$@")
        return
        ;;
      --*=*) name="${1%%=*}" value="${1#*=}" ;;
      --*)
        (($# > 1)) || refuse "$1 needs a value"
        name="$1" value="$2"
        shift
        ;;
      *) refuse "unexpected argument '$1'; what agentrl is to be given stands after --" ;;
    esac
    shift
    name="${name#--}"
    [[ " $known " == *" $name "* ]] || refuse "unknown flag --$name; known: --${known// / --}"
    [[ -n "$value" ]] || refuse "--$name needs a value"
    printf -v "$(variable "$name")" '%s' "$value"
  done
}

# Prints the variable of a flag: accelerator-type is in ACCELERATOR_TYPE.
variable() {
  echo "$1" | tr 'a-z-' 'A-Z_'
}

# require name... refuses a command line without one of these flags.
require() {
  local name variable
  for name in "$@"; do
    variable="$(variable "$name")"
    [[ -n "${!variable:-}" ]] || refuse "--$name is missing"
  done
}

# require_number name... refuses flags that are no whole numbers of at least 1.
require_number() {
  local name variable
  for name in "$@"; do
    variable="$(variable "$name")"
    [[ "${!variable}" =~ ^[1-9][0-9]*$ ]] || refuse "--$name=${!variable} must be a whole number of at least 1"
  done
}

# Prints a command line that a shell reads back as these words.
quoted() {
  local word separator=''
  for word in "$@"; do
    printf '%s%q' "$separator" "$word"
    separator=' '
  done
}

# Prints the command that every process of the run executes.
agentrl_command() {
  quoted "$1" -m agentrl.main "--config=$CONFIG" "--workdir=$WORKDIR" "${@:2}" ${EXTRA[@]+"${EXTRA[@]}"}
}

# Runs a command, or prints it.
run() {
  if [[ "$DRY_RUN" == true ]]; then
    quoted "$@"
    echo
  else
    "$@"
  fi
}

# Gives its standard input to a command, or prints both.
run_with_input() {
  if [[ "$DRY_RUN" == true ]]; then
    echo "# to: $(quoted "$@")"
    cat
  else
    "$@"
  fi
}
