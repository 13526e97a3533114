#!/usr/bin/env python3
"""A program of libvirt's Python binding against a livepointd: many domains at once.

Usage: fleet.py URI COUNT DIRECTORY. Defines and starts COUNT domains from threads, hears of
everything by callbacks from an event loop, snapshots all of them at once while they run, ends
some by force, goes back to the snapshots, watches a slow snapshot and aborts it, and checks what it
is told at each step. Prints one line of JSON with what it saw; an exception ends it with status 1.
"""

import collections
import json
import sys
import threading
import time

import libvirt

TIMEOUT_S = 120

# What libvirt calls the events that this program looks at.
LIFECYCLE = {
    libvirt.VIR_DOMAIN_EVENT_DEFINED: "defined",
    libvirt.VIR_DOMAIN_EVENT_UNDEFINED: "undefined",
    libvirt.VIR_DOMAIN_EVENT_STARTED: "started",
    libvirt.VIR_DOMAIN_EVENT_SUSPENDED: "suspended",
    libvirt.VIR_DOMAIN_EVENT_RESUMED: "resumed",
    libvirt.VIR_DOMAIN_EVENT_STOPPED: "stopped",
    libvirt.VIR_DOMAIN_EVENT_SHUTDOWN: "shutdown",
    libvirt.VIR_DOMAIN_EVENT_CRASHED: "crashed",
}

DOMAIN_XML = """
<domain type='kvm'>
  <name>{name}</name>
  <memory unit='MiB'>32</memory>
  <os>
    <type arch='x86_64'>hvm</type>
    <kernel>builtin:{guest}</kernel>
    <cmdline>{options}</cmdline>
  </os>
  <devices>
    <console type='pty'/>
    <memballoon model='none'/>
  </devices>
</domain>
"""


class EventLoop:
    """libvirt's default event loop in a thread of its own."""

    def __init__(self):
        libvirt.virEventRegisterDefaultImpl()
        self._over = threading.Event()
        # A timer keeps the loop from sleeping for ever once it is to end.
        libvirt.virEventAddTimeout(200, lambda *_: None, None)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self):
        while not self._over.is_set():
            libvirt.virEventRunDefaultImpl()

    def end(self):
        self._over.set()
        self._thread.join(10)


class Witness:
    """Everything that callbacks told, by domain."""

    def __init__(self, connection):
        self._changed = threading.Condition()
        self.lifecycle = collections.defaultdict(list)
        self.jobs = collections.defaultdict(list)
        self.reboots = collections.Counter()
        self.closed = None
        self._connection = connection
        register = connection.domainEventRegisterAny
        self._callbacks = [
            register(None, libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, self._on_lifecycle, None),
            register(None, libvirt.VIR_DOMAIN_EVENT_ID_JOB_COMPLETED, self._on_job, None),
            register(None, libvirt.VIR_DOMAIN_EVENT_ID_REBOOT, self._on_reboot, None),
        ]
        connection.registerCloseCallback(self._on_close, None)

    def _on_lifecycle(self, _connection, domain, event, detail, _opaque):
        with self._changed:
            self.lifecycle[domain.name()].append((LIFECYCLE.get(event, event), detail))
            self._changed.notify_all()

    def _on_job(self, _connection, domain, stats, _opaque):
        with self._changed:
            self.jobs[domain.name()].append(stats)
            self._changed.notify_all()

    def _on_reboot(self, _connection, domain, _opaque):
        with self._changed:
            self.reboots[domain.name()] += 1
            self._changed.notify_all()

    def _on_close(self, _connection, reason, _opaque):
        self.closed = reason

    def wait(self, what, done):
        """Waits until `done` of this witness, or fails."""
        with self._changed:
            if not self._changed.wait_for(lambda: done(self), TIMEOUT_S):
                raise TimeoutError(f"{what}: {dict(self.lifecycle)}")

    def leave(self):
        for callback in self._callbacks:
            self._connection.domainEventDeregisterAny(callback)
        self._connection.unregisterCloseCallback()


def in_parallel(items, work):
    """Does `work` for each item in a thread of its own; raises the first error."""
    errors = []

    def guarded(item):
        try:
            work(item)
        except Exception as error:  # told by the caller
            errors.append((item, error))

    threads = [threading.Thread(target=guarded, args=(item,)) for item in items]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_S)
    if errors:
        item, error = errors[0]
        raise RuntimeError(f"{len(errors)} of {len(threads)} failed; {item}: {error}")


def check(condition, what):
    if not condition:
        raise AssertionError(what)


def expect_error(code, what, call):
    try:
        call()
    except libvirt.libvirtError as error:
        check(error.get_error_code() == code, f"{what}: {error.get_error_code()}, not {code}")
        return
    raise AssertionError(f"{what}: no error")


class Console:
    """A domain's console, as a stream."""

    def __init__(self, connection, domain):
        self._stream = connection.newStream(0)
        domain.openConsole(None, self._stream, libvirt.VIR_DOMAIN_CONSOLE_FORCE)

    def ask(self, line, answer):
        self._stream.send((line + "\r").encode())
        seen = ""
        deadline = time.monotonic() + TIMEOUT_S
        while answer not in seen:
            check(time.monotonic() < deadline, f"no {answer!r} in {seen!r}")
            got = self._stream.recv(4096)
            check(got not in (b"", -1), f"the console ended after {seen!r}")
            seen += got.decode(errors="replace")

    def close(self):
        self._stream.finish()


def start_all(connection, names, witness):
    def start(name):
        domain = connection.defineXML(DOMAIN_XML.format(name=name, guest="echo", options=""))
        domain.create()
        check(domain.isActive() == 1, f"{name} is not active")

    in_parallel(names, start)
    witness.wait(
        "not all have started",
        lambda seen: all(("started", 0) in seen.lifecycle[name] for name in names),
    )
    ids = [connection.lookupByName(name).ID() for name in names]
    check(len(set(ids)) == len(names) and min(ids) > 0, f"ids {ids}")


def snapshot_all(connection, names, witness):
    def snapshot(name):
        domain = connection.lookupByName(name)
        xml = "<domainsnapshot><name>one</name></domainsnapshot>"
        taken = domain.snapshotCreateXML(xml, libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_LIVE)
        check(taken.getName() == "one", taken.getName())
        state, _ = domain.state()
        check(state == libvirt.VIR_DOMAIN_RUNNING, f"{name} does not run after a snapshot")

    in_parallel(names, snapshot)
    witness.wait("not all jobs", lambda seen: all(seen.jobs[name] for name in names))
    downtimes = []
    for name in names:
        stats = connection.lookupByName(name).jobStats(libvirt.VIR_DOMAIN_JOB_STATS_COMPLETED)
        check(stats["type"] == libvirt.VIR_DOMAIN_JOB_COMPLETED, stats)
        check(stats["operation"] == libvirt.VIR_DOMAIN_JOB_OPERATION_SNAPSHOT, stats)
        check(stats["memory_total"] == 32 << 20, stats)
        check(stats == {**witness.jobs[name][0], "type": stats["type"]}, "the event's figures")
        downtimes.append(stats["livepoint.downtime_us"])
    return downtimes


def revert_all(connection, names, witness):
    def revert(name):
        domain = connection.lookupByName(name)
        domain.revertToSnapshot(domain.snapshotLookupByName("one"))
        state, reason = domain.state()
        check(state == libvirt.VIR_DOMAIN_RUNNING, f"{name}: {state}")
        check(reason == libvirt.VIR_DOMAIN_RUNNING_FROM_SNAPSHOT, f"{name}: {reason}")

    # Half of them are gone when their snapshot is gone back to.
    for name in names[::2]:
        connection.lookupByName(name).destroy()
    in_parallel(names, revert)
    back = ("started", libvirt.VIR_DOMAIN_EVENT_STARTED_FROM_SNAPSHOT)
    witness.wait(
        "not all are back",
        lambda seen: all(back in seen.lifecycle[name] for name in names),
    )


def look_around(connection, names):
    everything = connection.getAllDomainStats()
    check(sorted(domain.name() for domain, _ in everything) == sorted(names), "domstats")
    for _, stats in everything:
        check(stats["state.state"] == libvirt.VIR_DOMAIN_RUNNING, stats)
        check(stats["livepoint.checkpoints"] == 1, stats)
    domain = connection.lookupByName(names[0])
    check(domain.info()[1:3] == [32 << 10, 32 << 10], domain.info())
    check(domain.memoryStats()["rss"] > 0, domain.memoryStats())
    expect_error(
        libvirt.VIR_ERR_NO_DOMAIN, "a lookup", lambda: connection.lookupByName("nobody")
    )
    expect_error(
        libvirt.VIR_ERR_NO_DOMAIN_SNAPSHOT,
        "a snapshot",
        lambda: domain.snapshotLookupByName("two"),
    )
    expect_error(libvirt.VIR_ERR_OPERATION_INVALID, "a start", domain.create)


def talk(connection, name):
    domain = connection.lookupByName(name)
    console = Console(connection, domain)
    console.ask("from python", "echo: from python")
    console.close()


def watch_and_abort(connection, witness):
    """Follows the figures of a job that is held to a mebibyte a second, and ends it."""
    name = "fleet-busy"
    options = "ws=16M rate=64M tick_ms=0"
    xml = DOMAIN_XML.format(name=name, guest="pagewriter", options=options)
    domain = connection.createXML(xml)
    domain.migrateSetMaxSpeed(1)
    outcome = []

    def snapshot():
        document = "<domainsnapshot><name>slow</name></domainsnapshot>"
        try:
            domain.snapshotCreateXML(document, libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_LIVE)
            outcome.append(None)
        except libvirt.libvirtError as error:
            outcome.append(error.get_error_code())

    deadline = time.monotonic() + TIMEOUT_S
    seen = {}
    # One that is taken before the guest has filled its memory is over in no time.
    while not seen:
        check(time.monotonic() < deadline, "no job was seen at work")
        thread = threading.Thread(target=snapshot)
        thread.start()
        while thread.is_alive() and not seen:
            check(time.monotonic() < deadline, "the job does nothing")
            stats = domain.jobStats()
            if stats["type"] == libvirt.VIR_DOMAIN_JOB_BOUNDED and stats["data_processed"] > 0:
                seen = stats
            time.sleep(0.005)
        if seen:
            abort(domain)
        thread.join(TIMEOUT_S)
        check(not thread.is_alive(), "the snapshot does not end")
        if outcome[-1] is None:
            domain.snapshotLookupByName("slow").delete()
            seen = {}
    check(outcome[-1] == libvirt.VIR_ERR_OPERATION_ABORTED, outcome)
    check(seen["operation"] == libvirt.VIR_DOMAIN_JOB_OPERATION_SNAPSHOT, seen)
    check(seen["data_total"] == 32 << 20, seen)
    check(0 < seen["data_remaining"] == seen["data_total"] - seen["data_processed"], seen)
    check(domain.listAllSnapshots() == [], "an aborted snapshot is left")
    check(domain.state()[0] == libvirt.VIR_DOMAIN_RUNNING, "an aborted job ended the guest")
    domain.destroy()
    gone = ("stopped", libvirt.VIR_DOMAIN_EVENT_STOPPED_DESTROYED)
    witness.wait("it does not end", lambda seen: gone in seen.lifecycle[name])


def abort(domain):
    try:
        domain.abortJob()
    except libvirt.libvirtError as error:
        # The job was over first; the caller finds the snapshot.
        check(error.get_error_code() == libvirt.VIR_ERR_OPERATION_INVALID, error)


def end_all(connection, names, witness):
    def end(name):
        domain = connection.lookupByName(name)
        domain.shutdown()

    in_parallel(names, end)
    off = ("stopped", libvirt.VIR_DOMAIN_EVENT_STOPPED_SHUTDOWN)
    witness.wait(
        "not all have shut down",
        lambda seen: all(off in seen.lifecycle[name] for name in names),
    )
    for name in names:
        domain = connection.lookupByName(name)
        domain.snapshotLookupByName("one").delete()
        domain.undefine()
    check(connection.listAllDomains() == [], "domains are left")


def main():
    uri, count, _directory = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    libvirt.registerErrorHandler(lambda *_: None, None)
    loop = EventLoop()
    connection = libvirt.open(uri)
    connection.setKeepAlive(5, 5)
    witness = Witness(connection)
    names = [f"fleet-{number:02}" for number in range(count)]
    times = {}

    def timed(what, work, *arguments):
        start = time.monotonic()
        result = work(*arguments)
        times[what] = round(time.monotonic() - start, 3)
        return result

    timed("start_s", start_all, connection, names, witness)
    downtimes = timed("snapshot_s", snapshot_all, connection, names, witness)
    timed("revert_s", revert_all, connection, names, witness)
    timed("look_s", look_around, connection, names)
    timed("talk_s", talk, connection, names[0])
    timed("abort_s", watch_and_abort, connection, witness)
    timed("end_s", end_all, connection, names, witness)
    witness.leave()
    check(witness.closed is None, "the connection was closed")
    connection.close()
    loop.end()
    events = sum(len(events) for events in witness.lifecycle.values())
    print(
        json.dumps(
            {
                "domains": count,
                "lifecycle_events": events,
                "downtime_us_max": max(downtimes),
                "downtime_us_median": sorted(downtimes)[count // 2],
                **times,
            }
        )
    )


if __name__ == "__main__":
    main()
