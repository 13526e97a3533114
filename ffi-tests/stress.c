/*
 * Eight threads that call at random: with handles that others use, and release, at the same time,
 * and with arguments that are wrong.
 *
 *     stress IMAGE ECHO.elf DIRECTORY SECONDS SEED
 *
 * Whatever comes, a call returns a status that the header names, says why if it is an error, and
 * never finds a bug in the library. A handle is released only while no other thread uses it, as the
 * header asks: that is what the locks here are for.
 */
#define _GNU_SOURCE
#include "check.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

enum { THREADS = 8, SHARED = 2, REGION_BYTES = 1 << 20, REGIONS = 3, ENDING_S = 240 };

static const char *image_path, *kernel, *dir;
static atomic_int stop;
static atomic_ullong calls, refused;

/* ---- Random numbers, and what may come back ----------------------------------------------- */

static _Thread_local uint64_t random_state;

static uint64_t any(uint64_t below)
{
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return random_state % below;
}

/* A number that is hostile now and then. */
static uint64_t number(uint64_t below)
{
    static const uint64_t hostile[] = {0, 1, UINT64_MAX, UINT64_MAX - 4095, 1ULL << 63, 1ULL << 32};
    return any(8) ? any(below) : hostile[any(sizeof hostile / sizeof hostile[0])];
}

#define TRIED(call) tried((call), #call)

static lvp_status tried(lvp_status status, const char *call)
{
    calls++;
    if (status == LVP_OK)
        return status;
    refused++;
    switch (status) {
    case LVP_E_INVALID: case LVP_E_UNSUPPORTED: case LVP_E_NOT_FOUND: case LVP_E_STATE:
    case LVP_E_BUSY: case LVP_E_HOST: case LVP_E_IO: case LVP_E_TIMEOUT: case LVP_E_CANCELLED:
        if (strlen(lvp_error_message()) > 0)
            return status;
        break;
    default:
        break;
    }
    fprintf(stderr, "%s: status %d: %s\n", call, (int)status, lvp_error_message());
    exit(1);
}

/* ---- Handles that threads share ----------------------------------------------------------- */

struct shared {
    pthread_rwlock_t lock;
    void *handle;
};

static struct shared machines[SHARED], jobs[SHARED], watches[SHARED], images[SHARED], states[SHARED],
    guests[1];

/* Takes a handle to use; it may be NULL. */
static void *use(struct shared *shared)
{
    pthread_rwlock_rdlock(&shared->lock);
    return shared->handle;
}

static void done(struct shared *shared)
{
    pthread_rwlock_unlock(&shared->lock);
}

/* Puts another handle in the place of one, and returns that: nobody uses it any more. */
static void *replace(struct shared *shared, void *handle)
{
    pthread_rwlock_wrlock(&shared->lock);
    void *old = shared->handle;
    shared->handle = handle;
    pthread_rwlock_unlock(&shared->lock);
    return old;
}

/* Jobs that are given up are asked to end, and waited for at the end of the program. */
static pthread_mutex_t given_up_lock = PTHREAD_MUTEX_INITIALIZER;
static lvp_job *given_up[1 << 16];
static size_t given_up_count;

static void give_up(lvp_job *job)
{
    if (!job || any(4) == 0) {
        CHECK(job ? lvp_job_cancel(job) : LVP_OK);
        lvp_status status = job ? lvp_job_wait(job, ENDING_S * 1000L) : LVP_OK;
        EXPECT(status != LVP_E_TIMEOUT || strstr(lvp_error_message(), "still runs") == NULL);
        lvp_job_free(job);
        return;
    }
    pthread_mutex_lock(&given_up_lock);
    EXPECT(given_up_count < sizeof given_up / sizeof given_up[0]);
    given_up[given_up_count++] = job;
    pthread_mutex_unlock(&given_up_lock);
}

/* ---- Machines, jobs and events ------------------------------------------------------------ */

static lvp_machine *new_machine(void)
{
    static atomic_int names;
    char xml[8192];
    snprintf(xml, sizeof xml,
             "<domain type='kvm'><name>stress-%d</name><memory unit='MiB'>16</memory>"
             "<os><type arch='x86_64'>hvm</type><kernel>%s</kernel></os>"
             "<devices><serial type='pty'/><memballoon model='none'/></devices></domain>",
             names++, kernel);
    int sockets[2];
    EXPECT(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, sockets) == 0);
    int with_socket = (int)any(2);
    lvp_machine_options options = {.struct_size = sizeof options,
                                   .runtime_dir = dir,
                                   .console_fds = with_socket ? &sockets[1] : NULL,
                                   .console_count = (size_t)with_socket};
    lvp_machine *machine = NULL;
    TRIED(lvp_machine_new(xml, &options, &machine));
    close(sockets[0]);
    close(sockets[1]);
    return machine;
}

static void count_event(void *data, const lvp_event *event)
{
    EXPECT(event->number > 0);
    (*(atomic_ullong *)data)++;
}

static atomic_ullong events_called;

static void start_checkpoint(struct shared *from, int is_guest)
{
    static _Thread_local char path[4096];
    snprintf(path, sizeof path, "%s/%d-%llu.lpi", dir, is_guest, (unsigned long long)any(4));
    lvp_checkpoint_options options = {.struct_size = sizeof options,
                                      .protocol = (lvp_protocol)any(8) % 3,
                                      .codec = (lvp_codec)number(5),
                                      .threads = (uint32_t)number(3),
                                      .no_sync = 1,
                                      .pause_limit_ms = 30000};
    lvp_job *job = NULL;
    void *handle = use(from);
    if (is_guest)
        TRIED(lvp_guest_checkpoint(handle, path, any(9) ? &options : NULL, &job));
    else
        TRIED(lvp_machine_checkpoint(handle, path, any(9) ? &options : NULL, &job));
    done(from);
    if (job)
        give_up(replace(&jobs[any(SHARED)], job));
}

static void use_machine(struct shared *shared)
{
    lvp_machine *machine = use(shared);
    lvp_machine_state state = 0;
    char *text = NULL;
    int fd = -1;
    lvp_events *events = NULL;
    switch (any(13)) {
    case 0: TRIED(lvp_machine_pause(machine)); break;
    case 1: TRIED(lvp_machine_resume(machine)); break;
    case 2: TRIED(lvp_machine_reset(machine)); break;
    case 3: TRIED(lvp_machine_shutdown(machine)); break;
    case 4: TRIED(lvp_machine_destroy(machine)); break;
    case 5: TRIED(lvp_machine_wait(machine, (int64_t)any(5), any(2) ? &state : NULL)); break;
    case 6: TRIED(lvp_machine_get_state(machine, any(9) ? &state : NULL)); break;
    case 7: TRIED(lvp_machine_xml(machine, any(9) ? &text : NULL)); break;
    case 8: TRIED(lvp_machine_inspect(machine, &text)); break;
    case 9: TRIED(lvp_machine_console(machine, (uint32_t)number(2), &fd)); break;
    case 10:
        if (any(2))
            TRIED(lvp_machine_events(machine, NULL, NULL, &events));
        else
            TRIED(lvp_machine_events(machine, count_event, &events_called, &events));
        break;
    default: TRIED(lvp_machine_start(machine)); break;
    }
    done(shared);
    lvp_string_free(text);
    if (fd >= 0)
        close(fd);
    if (events)
        lvp_events_free(replace(&watches[any(SHARED)], events));
}

static void use_events(struct shared *shared)
{
    lvp_events *events = use(shared);
    lvp_event event = {.struct_size = any(9) ? sizeof event : number(64)};
    struct pollfd waiting = {.fd = lvp_events_fd(events), .events = POLLIN};
    if (waiting.fd >= 0)
        EXPECT(poll(&waiting, 1, 0) >= 0);
    TRIED(lvp_events_next(events, (int64_t)any(3), &event));
    done(shared);
}

static void use_job(struct shared *shared)
{
    lvp_job *job = use(shared);
    lvp_progress progress = {.struct_size = any(9) ? sizeof progress : number(40)};
    lvp_statistics statistics = {.struct_size = sizeof statistics};
    const char *path = NULL;
    char *text = NULL;
    switch (any(9)) {
    case 0: TRIED(lvp_job_wait(job, (int64_t)any(5))); break;
    case 1: TRIED(lvp_job_cancel(job)); break;
    case 2: TRIED(lvp_job_progress(job, any(9) ? &progress : NULL)); break;
    case 3: TRIED(lvp_job_statistics(job, &statistics)); break;
    case 4: TRIED(lvp_job_image(job, any(9) ? &path : NULL)); break;
    case 5: TRIED(lvp_job_inspect(job, &text)); break;
    case 6: EXPECT((lvp_job_error(job) != NULL) == (job != NULL)); break;
    case 7: EXPECT((lvp_job_number(job) != 0) == (job != NULL)); break;
    default: EXPECT((lvp_job_fd(job) >= 0) == (job != NULL)); break;
    }
    EXPECT(path == NULL || path[0] == '/');
    done(shared);
    lvp_string_free(text);
}

/* ---- Images and states -------------------------------------------------------------------- */

static void use_image(struct shared *shared)
{
    lvp_image *image = use(shared);
    lvp_image_range range = {.struct_size = sizeof range};
    lvp_section section = {.struct_size = sizeof section};
    lvp_state *state = NULL;
    char *text = NULL, flat[4096];
    static _Thread_local unsigned char buffer[70000];
    size_t ranges = lvp_image_range_count(image), sections = lvp_image_section_count(image);
    switch (any(10)) {
    case 0: TRIED(lvp_image_get_range(image, number(ranges + 1), &range)); break;
    case 1: TRIED(lvp_image_section(image, number(sections + 1), &section)); break;
    case 2: TRIED(lvp_image_inspect(image, &text)); break;
    case 3: TRIED(lvp_image_description(image, any(9) ? &text : NULL)); break;
    case 4: TRIED(lvp_image_state(image, &state)); break;
    case 5: TRIED(lvp_image_verify(image)); break;
    case 6:
        snprintf(flat, sizeof flat, "%s/%lx.flat", dir, (unsigned long)pthread_self());
        TRIED(lvp_image_export(image, flat));
        break;
    default:
        TRIED(lvp_image_read(image, number(8 << 20), any(9) ? buffer : NULL, any(sizeof buffer)));
        break;
    }
    done(shared);
    lvp_string_free(text);
    if (state)
        lvp_state_free(replace(&states[any(SHARED)], state));
}

static void use_state(struct shared *shared)
{
    static const char *const kinds[] = {"vcpu", "x", "", "a\nb", NULL, "clock", "\xff", "y"};
    const char *kind = kinds[any(sizeof kinds / sizeof kinds[0])];
    lvp_state *state = use(shared);
    lvp_section section = {.struct_size = sizeof section};
    int fds[2] = {-1, 0};
    size_t count = lvp_state_section_count(state);
    switch (any(6)) {
    case 0: TRIED(lvp_state_find(state, kind, (uint32_t)number(9), &section)); break;
    case 1: TRIED(lvp_state_section(state, number(count + 1), any(9) ? &section : NULL)); break;
    case 2: TRIED(lvp_kvm_state_save(state, (int)any(3) - 1, any(9) ? fds : NULL, any(3))); break;
    case 3:
        TRIED(lvp_kvm_state_restore(state, (int)any(3) - 1, fds, any(3), (lvp_clock)number(3)));
        break;
    default:
        TRIED(lvp_state_add(state, kind, (uint32_t)number(99), (uint32_t)number(99), "data", any(5)));
        break;
    }
    done(shared);
}

/* ---- A guest of a VMM's own ---------------------------------------------------------------- */

static int vm;
static unsigned char *memory;

static lvp_guest *new_guest(void)
{
    lvp_guest_options options = {.struct_size = sizeof options, .vm_fd = vm, .vcpu_count = 2};
    lvp_guest_callbacks callbacks = {.struct_size = sizeof callbacks};
    lvp_guest *guest = NULL;
    TRIED(lvp_guest_new(&options, any(9) ? &callbacks : NULL, &guest));
    return guest;
}

static lvp_status give_back(void *page)
{
    return madvise(page, 4096, MADV_DONTNEED) == 0 ? LVP_OK : LVP_E_IO;
}

static void use_guest(struct shared *shared)
{
    lvp_guest *guest = use(shared);
    uint32_t slot = (uint32_t)any(REGIONS);
    unsigned char *start = memory + slot * REGION_BYTES;
    lvp_guest_region region = {.struct_size = any(9) ? sizeof region : number(64),
                               .gpa = (uint64_t)slot * REGION_BYTES,
                               .hva = any(9) ? start : NULL,
                               .bytes = any(9) ? REGION_BYTES : number(REGION_BYTES),
                               .slot = slot};
    uint64_t gpa = region.gpa + any(REGION_BYTES / 4096) * 4096;
    lvp_fill_options fill = {.struct_size = sizeof fill, .threads = (uint32_t)number(3)};
    lvp_gate gate;
    switch (any(9)) {
    case 0: TRIED(lvp_guest_remove_region(guest, (uint32_t)number(REGIONS))); break;
    case 1: TRIED(lvp_guest_discard(guest, gpa, 4096, any(9) ? give_back : NULL, memory + gpa)); break;
    case 2: TRIED(lvp_guest_vcpu_enter(guest, (uint32_t)number(3), (int)any(3) - 1)); break;
    case 3:
        gate = lvp_guest_vcpu_gate(guest, (uint32_t)number(3));
        EXPECT(gate == LVP_E_INVALID || gate == LVP_E_STATE);
        break;
    case 4:
        gate = lvp_guest_vcpu_leave(guest, (uint32_t)number(3));
        EXPECT(gate == LVP_E_INVALID || gate == LVP_E_STATE);
        break;
    case 5: {
        struct shared *from = &images[any(SHARED)];
        TRIED(lvp_guest_fill(guest, use(from), any(2) ? &fill : NULL));
        done(from);
        break;
    }
    case 6: TRIED(lvp_guest_mark_dirty(guest, number(REGION_BYTES), number(REGION_BYTES))); break;
    default: TRIED(lvp_guest_add_region(guest, any(9) ? &region : NULL)); break;
    }
    done(shared);
}

/* ---- Calls without a handle, and the ends of handles --------------------------------------- */

static void log_nothing(void *data, lvp_log_level level, const char *target, const char *message)
{
    EXPECT(data == NULL && level <= LVP_LOG_DEBUG && target && message);
}

static void call_plain(void)
{
    char *text = NULL;
    switch (any(5)) {
    case 0: TRIED(lvp_domain_check("<domain type='kvm'/>", any(2) ? &text : NULL, NULL)); break;
    case 1: TRIED(lvp_log_set(any(2) ? log_nothing : NULL, NULL, (lvp_log_level)number(5))); break;
    case 2: TRIED(lvp_host_check()); break;
    case 3: EXPECT(lvp_version() == LVP_VERSION_NUMBER); break;
    default: EXPECT(lvp_error_message() != NULL && lvp_version_string() != NULL); break;
    }
    lvp_string_free(text);
}

static void release_something(void)
{
    lvp_image *image = NULL;
    lvp_state *state = NULL;
    switch (any(8)) {
    case 0: lvp_machine_free(replace(&machines[any(SHARED)], any(9) ? new_machine() : NULL)); break;
    case 1: give_up(replace(&jobs[any(SHARED)], NULL)); break;
    case 2: lvp_events_free(replace(&watches[any(SHARED)], NULL)); break;
    case 3:
        TRIED(lvp_image_open(any(9) ? image_path : "/nonexistent", &image));
        lvp_image_free(replace(&images[any(SHARED)], image));
        break;
    case 4: lvp_guest_free(replace(&guests[0], new_guest())); break;
    default:
        TRIED(lvp_state_new(any(9) ? &state : NULL));
        lvp_state_free(replace(&states[any(SHARED)], state));
        break;
    }
}

static void *call_at_random(void *seed)
{
    random_state = (uint64_t)(uintptr_t)seed;
    while (!stop) {
        switch (any(24)) {
        case 0: case 1: case 2: case 3: case 4: case 5: use_machine(&machines[any(SHARED)]); break;
        case 6: start_checkpoint(&machines[any(SHARED)], 0); break;
        case 7: start_checkpoint(&guests[0], 1); break;
        case 8: case 9: case 10: use_job(&jobs[any(SHARED)]); break;
        case 11: case 12: use_events(&watches[any(SHARED)]); break;
        case 13: case 14: case 15: use_image(&images[any(SHARED)]); break;
        case 16: case 17: use_state(&states[any(SHARED)]); break;
        case 18: case 19: case 20: case 21: use_guest(&guests[0]); break;
        case 22: call_plain(); break;
        default: release_something(); break;
        }
    }
    return NULL;
}

static void prepare(struct shared *shared, size_t count)
{
    for (size_t i = 0; i < count; i++)
        EXPECT(pthread_rwlock_init(&shared[i].lock, NULL) == 0);
}

int main(int argc, char **argv)
{
    EXPECT(argc == 6);
    image_path = argv[1];
    kernel = argv[2];
    dir = argv[3];
    long seconds = strtol(argv[4], NULL, 10);
    uint64_t seed = strtoull(argv[5], NULL, 10);
    printf("stress: seed %llu\n", (unsigned long long)seed);
    int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
    EXPECT(kvm >= 0);
    vm = ioctl(kvm, KVM_CREATE_VM, 0);
    EXPECT(vm >= 0);
    memory = mmap(NULL, REGIONS * REGION_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
                  -1, 0);
    EXPECT(memory != MAP_FAILED);
    for (uint32_t slot = 0; slot < REGIONS; slot++) {
        struct kvm_userspace_memory_region region = {
            .slot = slot,
            .guest_phys_addr = (uint64_t)slot * REGION_BYTES,
            .memory_size = REGION_BYTES,
            .userspace_addr = (uintptr_t)memory + slot * REGION_BYTES};
        EXPECT(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region) == 0);
    }
    prepare(machines, SHARED);
    prepare(jobs, SHARED);
    prepare(watches, SHARED);
    prepare(images, SHARED);
    prepare(states, SHARED);
    prepare(guests, 1);
    random_state = seed | 1;
    guests[0].handle = new_guest();
    for (int i = 0; i < SHARED; i++)
        machines[i].handle = new_machine();

    pthread_t threads[THREADS];
    for (uintptr_t n = 0; n < THREADS; n++) {
        uintptr_t own = (seed + n + 1) * 0x9e3779b97f4a7c15;
        EXPECT(pthread_create(&threads[n], NULL, call_at_random, (void *)(own | 1)) == 0);
    }
    sleep_ms(seconds * 1000);
    stop = 1;
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += ENDING_S;
    for (int n = 0; n < THREADS; n++)
        if (pthread_timedjoin_np(threads[n], NULL, &until) != 0) {
            fprintf(stderr, "thread %d hangs\n", n);
            abort();
        }
    CHECK(lvp_log_set(NULL, NULL, LVP_LOG_NONE));
    for (int i = 0; i < SHARED; i++) {
        lvp_machine_free(machines[i].handle);
        give_up(jobs[i].handle);
        lvp_events_free(watches[i].handle);
        lvp_image_free(images[i].handle);
        lvp_state_free(states[i].handle);
    }
    lvp_guest_free(guests[0].handle);
    for (size_t i = 0; i < given_up_count; i++) {
        lvp_status status = lvp_job_wait(given_up[i], ENDING_S * 1000L);
        EXPECT(status != LVP_E_TIMEOUT || strstr(lvp_error_message(), "still runs") == NULL);
        lvp_job_free(given_up[i]);
    }
    EXPECT(refused < calls);
    printf("stress: %llu calls, %llu of them refused, %llu events by callback\n",
           (unsigned long long)calls, (unsigned long long)refused,
           (unsigned long long)events_called);
    return 0;
}
