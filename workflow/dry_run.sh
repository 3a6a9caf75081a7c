# dry_run.sh SNAKEMAKE...: a dry run of Snakemake, of whose words only the plan is shown.
# Jobs keep their messages; times, numbers, reasons and the profile's name go.
status=$(mktemp)
{ "$@" --quiet host reason progress 2>&1; echo $? > "$status"; } | awk '
  /^Reasons:$/ {skip = 1}
  !skip && !/^\[.*\]$/ && !/^(Using profile|host:|Building DAG|everything is made)/ {
    sub(/^Job [0-9]+: /, ""); print; fflush()
  }
  /^This was a dry-run/ {skip = 0}
'
code=$(cat "$status")
rm "$status"
exit "$code"
