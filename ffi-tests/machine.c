/*
 * A machine from outside: its console by a socket and by its terminal, its events by a descriptor
 * and by a callback, and what the library logs.
 *
 *     machine ECHO.elf DIRECTORY
 *
 * ECHO.elf is the guest `echo`, which answers on its console.
 */
#define _GNU_SOURCE
#include "check.h"

#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <sys/socket.h>
#include <unistd.h>

enum { PATIENCE_MS = 60000 };

/* ---- The console -------------------------------------------------------------------------- */

static char said[1 << 16];
static size_t said_bytes;

/* Reads the console until the guest has said `wanted`, and forgets it. */
static void wait_for(int fd, const char *wanted)
{
    char *found;
    while ((found = strstr(said, wanted)) == NULL) {
        struct pollfd input = {.fd = fd, .events = POLLIN};
        if (poll(&input, 1, PATIENCE_MS) != 1) {
            fprintf(stderr, "no %s in: %s\n", wanted, said);
            exit(1);
        }
        EXPECT(said_bytes + 1 < sizeof said);
        ssize_t got = read(fd, said + said_bytes, sizeof said - 1 - said_bytes);
        EXPECT(got > 0);
        said_bytes += (size_t)got;
        said[said_bytes] = 0;
    }
    size_t past = (size_t)(found - said) + strlen(wanted);
    memmove(said, said + past, said_bytes - past + 1);
    said_bytes -= past;
}

static void say(int fd, const char *line)
{
    EXPECT(write(fd, line, strlen(line)) == (ssize_t)strlen(line));
    EXPECT(write(fd, "\r", 1) == 1);
}

/* ---- Events ------------------------------------------------------------------------------- */

static uint64_t last_number;

/* Waits for the next event by poll(2) and takes it: it must be this one. */
static lvp_event next(lvp_events *events, lvp_event_kind kind, lvp_machine_state state)
{
    struct pollfd waiting = {.fd = lvp_events_fd(events), .events = POLLIN};
    EXPECT(waiting.fd >= 0);
    EXPECT(poll(&waiting, 1, PATIENCE_MS) == 1);
    lvp_event event = {.struct_size = sizeof event};
    CHECK(lvp_events_next(events, 0, &event));
    if (event.kind != kind || event.state != state) {
        fprintf(stderr, "event %u in state %u (%s) instead of %u in %u\n", event.kind,
                event.state, event.text, kind, state);
        exit(1);
    }
    EXPECT(event.number == last_number + 1);
    last_number = event.number;
    return event;
}

static atomic_int called, called_last, freed_inside;

static void count_call(void *data, const lvp_event *event)
{
    EXPECT(data == &called && event->struct_size >= sizeof *event);
    called++;
    called_last = (int)event->kind;
}

static lvp_events *frees_itself;
static atomic_int may_free;

static void free_itself(void *data, const lvp_event *event)
{
    EXPECT(data == NULL && event->kind == LVP_EVENT_STARTED);
    while (!may_free)
        sleep_ms(1);
    lvp_events_free(frees_itself);
    freed_inside++;
}

/* ---- Logs --------------------------------------------------------------------------------- */

static atomic_int logged, refused_inside;

static void log_line(void *data, lvp_log_level level, const char *target, const char *message)
{
    EXPECT(data == &logged && level >= LVP_LOG_ERROR && level <= LVP_LOG_DEBUG);
    EXPECT(strncmp(target, "livepoint", 9) == 0 && strchr(message, '\n') == NULL);
    logged++;
    /* Not from here. */
    if (lvp_log_set(NULL, NULL, LVP_LOG_NONE) == LVP_E_STATE)
        refused_inside++;
}

static void take_logs(void)
{
    REFUSED(lvp_log_set(log_line, &logged, 99), LVP_E_INVALID);
    CHECK(lvp_log_set(log_line, &logged, LVP_LOG_DEBUG));
    CHECK(lvp_log_set(log_line, &logged, LVP_LOG_DEBUG));
}

/* ---- The machine -------------------------------------------------------------------------- */

static lvp_machine *make(const char *kernel, const char *serial, lvp_machine_options *options)
{
    char xml[8192];
    snprintf(xml, sizeof xml,
             "<domain type='kvm'><name>from-c</name><memory unit='MiB'>32</memory>"
             "<os><type arch='x86_64'>hvm</type><kernel>%s</kernel></os>"
             "<devices>%s<memballoon model='none'/></devices></domain>",
             kernel, serial);
    lvp_machine *machine = NULL;
    CHECK(lvp_machine_new(xml, options, &machine));
    return machine;
}

static void wait_end(lvp_machine *machine, lvp_machine_state state)
{
    lvp_machine_state end = 0;
    CHECK(lvp_machine_wait(machine, PATIENCE_MS, &end));
    EXPECT(end == state);
}

static void checkpoints(lvp_machine *machine, lvp_events *events, const char *dir)
{
    char path[4096];
    snprintf(path, sizeof path, "%s/machine.lpi", dir);
    lvp_checkpoint_options options = {.struct_size = sizeof options,
                                      .pause_limit_ms = 30000 /* a loaded machine */};
    lvp_job *job = NULL;
    for (uint64_t number = 1; number <= 2; number++) {
        CHECK(lvp_machine_checkpoint(machine, path, &options, &job));
        EXPECT(lvp_job_number(job) == number);
        EXPECT(next(events, LVP_EVENT_CHECKPOINT_STARTED, LVP_MACHINE_RUNNING).job == number);
        if (number == 2)
            CHECK(lvp_job_cancel(job));
        lvp_event ended = next(events, LVP_EVENT_CHECKPOINT_ENDED, LVP_MACHINE_RUNNING);
        EXPECT(ended.job == number && ended.status == lvp_job_wait(job, 0));
        EXPECT((ended.status == LVP_OK) == (ended.text[0] == 0));
        EXPECT(number == 2 || ended.status == LVP_OK);
        RESULT_GROWS(lvp_progress, 40, lvp_job_progress(job, result), LVP_OK);
        if (ended.status == LVP_OK)
            RESULT_GROWS(lvp_statistics, 64, lvp_job_statistics(job, result), LVP_OK);
        lvp_job_free(job);
    }
}

static void by_socket(const char *kernel, const char *dir)
{
    int sockets[2];
    EXPECT(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, sockets) == 0);
    lvp_machine_options options = {.struct_size = sizeof options,
                                   .runtime_dir = dir,
                                   .console_fds = &sockets[1],
                                   .console_count = 1};
    lvp_machine *machine = make(kernel, "<serial type='pty'/>", &options);
    close(sockets[1]);
    int fd = -1, console = sockets[0];

    /* Before the first start too. */
    lvp_events *events = NULL, *counted = NULL;
    CHECK(lvp_machine_events(machine, NULL, NULL, &events));
    CHECK(lvp_machine_events(machine, count_call, &called, &counted));
    CHECK(lvp_machine_events(machine, free_itself, NULL, &frees_itself));
    may_free = 1;
    lvp_event event = {.struct_size = sizeof event};
    EXPECT(lvp_events_fd(counted) == -1);
    REFUSED(lvp_events_next(counted, 0, &event), LVP_E_STATE);
    REFUSED(lvp_events_next(events, 10, &event), LVP_E_TIMEOUT);
    REFUSED(lvp_machine_console(machine, 0, &fd), LVP_E_STATE);

    CHECK(lvp_machine_start(machine));
    next(events, LVP_EVENT_STARTED, LVP_MACHINE_RUNNING);
    wait_for(console, "echo: ready");
    say(console, "hello");
    wait_for(console, "echo: hello");
    REFUSED(lvp_machine_console(machine, 0, &fd), LVP_E_UNSUPPORTED);
    REFUSED(lvp_machine_console(machine, 1, &fd), LVP_E_NOT_FOUND);

    CHECK(lvp_machine_pause(machine));
    next(events, LVP_EVENT_PAUSED, LVP_MACHINE_PAUSED);
    CHECK(lvp_machine_resume(machine));
    next(events, LVP_EVENT_RESUMED, LVP_MACHINE_RUNNING);
    for (int n = 0; n < 2; n++) { /* two more events */
        CHECK(n == 0 ? lvp_machine_pause(machine) : lvp_machine_resume(machine));
        last_number++;
    }
    RESULT_GROWS(lvp_event, 296, lvp_events_next(events, PATIENCE_MS, result), LVP_OK);
    take_logs();
    checkpoints(machine, events, dir);
    EXPECT(logged > 0);

    CHECK(lvp_machine_reset(machine));
    next(events, LVP_EVENT_RESET, LVP_MACHINE_RUNNING);
    wait_for(console, "echo: ready");
    CHECK(lvp_machine_shutdown(machine));
    event = next(events, LVP_EVENT_ENDED, LVP_MACHINE_SHUTOFF);
    EXPECT(event.reason == LVP_END_POWERED_OFF && event.text[0] != 0);
    wait_end(machine, LVP_MACHINE_SHUTOFF);
    CHECK(lvp_log_set(NULL, NULL, LVP_LOG_DEBUG));
    int lines = logged;
    EXPECT(refused_inside == lines);

    /* The same watch tells of the next run, and the console is at the same socket. */
    CHECK(lvp_machine_start(machine));
    next(events, LVP_EVENT_STARTED, LVP_MACHINE_RUNNING);
    wait_for(console, "echo: ready");
    say(console, "reboot");
    next(events, LVP_EVENT_RESET, LVP_MACHINE_RUNNING);
    wait_for(console, "echo: ready");
    say(console, "crash");
    event = next(events, LVP_EVENT_ENDED, LVP_MACHINE_CRASHED);
    EXPECT(event.reason == LVP_END_CRASHED && event.text[0] != 0);
    wait_end(machine, LVP_MACHINE_CRASHED);

    CHECK(lvp_machine_start(machine));
    next(events, LVP_EVENT_STARTED, LVP_MACHINE_RUNNING);
    lvp_machine_free(machine);
    event = next(events, LVP_EVENT_ENDED, LVP_MACHINE_SHUTOFF);
    EXPECT(event.reason == LVP_END_DESTROYED);
    /* None comes any more, which the descriptor says too. */
    struct pollfd over = {.fd = lvp_events_fd(events), .events = POLLIN};
    EXPECT(poll(&over, 1, 0) == 1);
    REFUSED(lvp_events_next(events, -1, &event), LVP_E_NOT_FOUND);
    lvp_events_free(events);
    for (int waited = 0; called_last != LVP_EVENT_ENDED || called < (int)last_number; waited++) {
        EXPECT(waited < PATIENCE_MS);
        sleep_ms(1);
    }
    lvp_events_free(counted);
    EXPECT(called == (int)last_number && freed_inside == 1);
    EXPECT(logged == lines); /* nothing since the callback was taken away */
    close(console);
    printf("socket: %d events, %d log lines\n", (int)called, lines);
}

/* Opens the console of a machine that has one of its own. */
static void by_path(const char *kernel, const char *dir, const char *serial, lvp_status wanted)
{
    lvp_machine_options options = {.struct_size = sizeof options, .runtime_dir = dir};
    lvp_machine *machine = make(kernel, serial, &options);
    CHECK(lvp_machine_start(machine));
    int console = -1;
    lvp_status status = lvp_machine_console(machine, 0, &console);
    EXPECT(status == wanted);
    if (status == LVP_OK) {
        said_bytes = 0;
        said[0] = 0;
        /* Who comes late has missed the greeting, and the guest what was typed before it. */
        for (int tries = 0; strstr(said, "echo: knock") == NULL; tries++) {
            EXPECT(tries < PATIENCE_MS / 100);
            say(console, "knock");
            struct pollfd input = {.fd = console, .events = POLLIN};
            while (poll(&input, 1, 100) == 1) {
                ssize_t got = read(console, said + said_bytes, sizeof said - 1 - said_bytes);
                EXPECT(got > 0);
                said_bytes += (size_t)got;
                said[said_bytes] = 0;
            }
        }
        close(console);
    }
    CHECK(lvp_machine_destroy(machine));
    lvp_machine_free(machine);
}

static void wrong_consoles(const char *kernel, const char *dir)
{
    int pipes[2];
    EXPECT(pipe(pipes) == 0);
    int two[2] = {pipes[0], pipes[1]}, none[1] = {-1}, closed[1] = {1000000};
    lvp_machine_options options = {.struct_size = sizeof options, .runtime_dir = dir};
    lvp_machine *machine = NULL;
    char xml[4096];
    snprintf(xml, sizeof xml,
             "<domain type='kvm'><name>wrong</name><memory unit='MiB'>32</memory>"
             "<os><type arch='x86_64'>hvm</type><kernel>%s</kernel></os>"
             "<devices><serial type='pty'/></devices></domain>",
             kernel);
    options.console_fds = two; /* no sockets */
    options.console_count = 1;
    REFUSED(lvp_machine_new(xml, &options, &machine), LVP_E_INVALID);
    options.console_count = 2; /* and one more than there are ports */
    REFUSED(lvp_machine_new(xml, &options, &machine), LVP_E_INVALID);
    options.console_fds = none;
    options.console_count = 1;
    REFUSED(lvp_machine_new(xml, &options, &machine), LVP_E_INVALID);
    options.console_fds = closed;
    REFUSED(lvp_machine_new(xml, &options, &machine), LVP_E_HOST);
    options.console_fds = NULL;
    REFUSED(lvp_machine_new(xml, &options, &machine), LVP_E_INVALID);
    options.console_fds = two;
    options.console_count = SIZE_MAX;
    REFUSED(lvp_machine_new(xml, &options, &machine), LVP_E_INVALID);
    EXPECT(machine == NULL);
    close(pipes[0]);
    close(pipes[1]);
}

int main(int argc, char **argv)
{
    EXPECT(argc == 3);
    by_socket(argv[1], argv[2]);
    by_path(argv[1], argv[2], "<serial type='pty'/>", LVP_OK);
    char serial[4096];
    snprintf(serial, sizeof serial,
             "<serial type='unix'><source mode='bind' path='%s/console'/></serial>", argv[2]);
    by_path(argv[1], argv[2], serial, LVP_OK);
    by_path(argv[1], argv[2], "<serial type='null'/>", LVP_E_UNSUPPORTED);
    wrong_consoles(argv[1], argv[2]);
    printf("machine: done\n");
    return 0;
}
