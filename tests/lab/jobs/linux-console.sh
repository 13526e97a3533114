# A stock kernel finds virtio consoles by the distribution's own module. A shell on the first, whose end in
# the host is a pty, answers what is typed, also while a live checkpoint is taken; on the second, whose end is
# a file, counted lines come out as fast as they may. After a kill and a restore the shell answers at the
# new pty, and the lines go on at a moment of the checkpoint: none is missing, and none comes twice.
consoles="<console type='pty'><target type='virtio'/></console>\
<console type='file'><source path='$work/lines' append='off'/><target type='virtio'/></console>"
linux_xml disk.xml | sed -e '/<disk/,/<\/disk>/d' -e "s|<memory unit='MiB'>512|<memory unit='MiB'>256|" \
    -e "s|<memballoon|$consoles&|" > linux.xml

# Opens the pty of the first console as a terminal program would: fd 6 reads, fd 5 writes. Children do so,
# because a job leads a session, whose terminal the pty would become.
terminal=()
open_pty() {
    local pty='' deadline=$((SECONDS + 120))
    # A machine that is being restored is not there yet.
    until pty=$("$LIVEPOINT" dumpxml linux-disk 2>> errors | sed -n "s|.*<console type='pty' tty='\([^']*\)'.*|\1|p") \
        && [ -n "$pty" ]; do
        [ $SECONDS -lt $deadline ] || fail "no document names a pty of a virtio console"
        nap 0.5
    done
    rm -f typed shown
    mkfifo typed shown
    exec 6<> shown 5<> typed
    cat "$pty" > shown 2> /dev/null 5>&- 6>&- &
    terminal=($!)
    cat < typed > "$pty" 2> /dev/null 5>&- 6>&- &
    terminal+=($!)
}

close_pty() {
    kill "${terminal[@]}" 2> /dev/null || true
    wait "${terminal[@]}" 2> /dev/null || true
}

# Types a command into the shell on the first console, and waits for the line that answers.
ask() {
    local line deadline=$((SECONDS + 120))
    echo "$1" >&5
    while [ $SECONDS -lt $deadline ]; do
        read -rt 1 -u 6 line || continue
        [[ $line != *"$2"* ]] || return 0
    done
    fail "no answer $2 at the console"
}

# Checks that each line of a file follows the one before it; the first and the last may be parts of lines.
# Sets `first` and `last` to the numbers of those between.
check_lines() {
    local answer
    answer=$(sed -e 's/\r$//' -e '$d' "$1" | awk 'NR == 1 { next }
        !n { first = $2 } n && $2 != n + 1 { print "WRONG " $0 " behind " n; exit } { n = $2 }
        $0 != "line " $2 " of many, and no other" { print "WRONG " $0; exit } END { print first, n }')
    [[ $answer =~ ^([0-9]+)\ ([0-9]+)$ ]] || fail "$1: $answer"
    first=${BASH_REMATCH[1]} last=${BASH_REMATCH[2]}
}

start_vm run linux.xml
wait_for 300 'lab: guest ready, 1 CPUs'
say 'echo consoles $(ls /sys/bus/virtio/drivers/virtio_console | grep -c ^virtio) $(ls /dev/hvc0 /dev/hvc1)'
wait_for 120 '^(lab# )*consoles 2 /dev/hvc0 /dev/hvc1'
say 'setsid sh -c "stty raw -echo; exec sh" < /dev/hvc0 > /dev/hvc0 2>&1 &'
say 'n=0; while :; do n=$((n + 1)); echo line $n of many, and no other; done > /dev/hvc1 &'
open_pty
ask 'echo answer $((6 * 7)) from $(tty)' 'answer 42 from /dev/hvc0'
turn=0
for protocol in $protocols; do
    checkpoint linux-disk --protocol "$protocol" --out image.lpi --json > figures.json &
    taking=$!
    while kill -0 $taking 2> /dev/null; do
        turn=$((turn + 1))
        ask "echo turn \$(($turn + 1000))" "turn $((turn + 1000))"
    done
    wait $taking
    kill_vm
    close_pty
    mv lines before
    start_vm restore image.lpi
    open_pty
    ask "echo $protocol \$((7 * 8)) from \$(tty)" "$protocol 56 from /dev/hvc0"
    cp lines after
    check_lines before
    before_first=$first before_last=$last
    check_lines after
    say_figures "$protocol: $turn turns; lines $before_first to $before_last before the kill, $first to $last after the restore"
    [ "$first" -ge "$before_first" ] && [ "$first" -le $((before_last + 2)) ] || fail "it did not go on at a captured moment"
    rm -f image.lpi
done
check_log boot
say 'poweroff -f'
close_pty
wait_vm 60 || fail "the process ended with status $?"
echo "all right"
