/*
 * A VMM with threads, signals and devices of its own, which uses the library as the header allows:
 * whatever it does, an image must be its memory at one moment, and its signals must be its own.
 *
 *     foreign DIRECTORY
 */
#define _GNU_SOURCE
#include "check.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <unistd.h>

enum {
    VCPUS = 2,
    MEMORY_BYTES = 32 << 20,
    EXTRA_BYTES = 4 << 20,
    EXTRA_GPA = 1 << 30,
    PAGE = 4096,
    CODE = 0x1000,
    PAGE_TABLES = 0x10000,
    /* Each vCPU writes this many pages, the device the ones behind them. */
    FIRST_PAGE = 1 << 20,
    WRITTEN_BYTES = 4 << 20,
    DEVICE_GPA = FIRST_PAGE + VCPUS * WRITTEN_BYTES,
    DEVICE_PAGES = 64,
    /* Memory that is given back now and then, and written again. */
    BALLOON_GPA = DEVICE_GPA + DEVICE_PAGES * PAGE,
    BALLOON_PAGES = 600,
};

/* Writes a growing number to each page of [rdx, rsi), round and round. */
static const uint8_t code[] = {
    0x48, 0x89, 0x07,                         /* loop: mov [rdi], rax */
    0x48, 0x81, 0xc7, 0x00, 0x10, 0x00, 0x00, /* add rdi, 4096 */
    0x48, 0x39, 0xf7,                         /* cmp rdi, rsi */
    0x72, 0xf1,                               /* jb loop */
    0x48, 0x89, 0xd7,                         /* mov rdi, rdx */
    0x48, 0xff, 0xc0,                         /* inc rax */
    0xe6, 0x80,                               /* out 0x80, al */
    0xeb, 0xe7,                               /* jmp loop */
};

/* How this run of the test has it. */
struct variant {
    const char *name;
    int kick_signal;   /* 0: the default */
    int own_kick;      /* the VMM kicks by itself */
    int own_dirty_log; /* host_dirty instead of lvp_guest_mark_dirty() */
    lvp_protocol protocol;
};

static int kvm, vm, vcpu_fds[VCPUS];
static struct kvm_run *runs[VCPUS];
static pthread_t threads[VCPUS];
static uint8_t *memory, *extra, *frozen;
static lvp_guest *guest;
static const struct variant *variant;
static atomic_int stop, save_fails;
static atomic_ullong turns[VCPUS], device_turns;
static atomic_int strange_kicks, alarms;
static pthread_mutex_t device_lock = PTHREAD_MUTEX_INITIALIZER;
static _Atomic uint64_t device_dirty[MEMORY_BYTES / PAGE / 64];
static atomic_int pauses, quiesces, resumes, in_pause;

static void make_vm(void)
{
    kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
    EXPECT(kvm >= 0);
    vm = ioctl(kvm, KVM_CREATE_VM, 0);
    EXPECT(vm >= 0);
    memory = mmap(NULL, MEMORY_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    EXPECT(memory != MAP_FAILED);
    struct kvm_userspace_memory_region slot = {
        .slot = 3, .memory_size = MEMORY_BYTES, .userspace_addr = (uintptr_t)memory};
    EXPECT(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &slot) == 0);
    EXPECT(ioctl(vm, KVM_SET_TSS_ADDR, 0xfffbd000UL) == 0);
    memcpy(memory + CODE, code, sizeof code);
    static uint64_t tables[3 * 512];
    tables[0] = (PAGE_TABLES + 0x1000) | 0x23;
    tables[512] = (PAGE_TABLES + 0x2000) | 0x23;
    for (uint64_t page = 0; page < MEMORY_BYTES >> 21; page++)
        tables[1024 + page] = page << 21 | 0xe3;
    memcpy(memory + PAGE_TABLES, tables, sizeof tables);
    int run_bytes = ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
    for (int n = 0; n < VCPUS; n++) {
        vcpu_fds[n] = ioctl(vm, KVM_CREATE_VCPU, n);
        runs[n] =
            mmap(NULL, (size_t)run_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu_fds[n], 0);
        EXPECT(runs[n] != MAP_FAILED);
    }
}

static void set_vcpu(int n)
{
    struct kvm_sregs sregs;
    EXPECT(ioctl(vcpu_fds[n], KVM_GET_SREGS, &sregs) == 0);
    struct kvm_segment flat = {
        .limit = UINT32_MAX, .selector = 0x10, .type = 11, .present = 1, .s = 1, .l = 1, .g = 1};
    sregs.cs = flat;
    flat.type = 3;
    flat.l = 0;
    flat.selector = 0x18;
    sregs.ds = sregs.es = sregs.ss = flat;
    sregs.cr0 = 0x80000031;
    sregs.cr3 = PAGE_TABLES;
    sregs.cr4 = 0x20;
    sregs.efer = 0x500;
    EXPECT(ioctl(vcpu_fds[n], KVM_SET_SREGS, &sregs) == 0);
    uint64_t first = FIRST_PAGE + (uint64_t)n * WRITTEN_BYTES;
    struct kvm_regs regs = {.rip = CODE,
                            .rflags = 2,
                            .rax = 1,
                            .rdi = first,
                            .rdx = first,
                            .rsi = first + WRITTEN_BYTES};
    EXPECT(ioctl(vcpu_fds[n], KVM_SET_REGS, &regs) == 0);
}

/* ---- The VMM's own signals ---------------------------------------------------------------- */

static void count_kick(int signal)
{
    (void)signal;
    strange_kicks++;
}

static void count_alarm(int signal)
{
    (void)signal;
    alarms++;
}

static void own_kick(int signal)
{
    (void)signal;
}

static void install_handlers(void)
{
    struct sigaction action = {.sa_handler = count_kick};
    EXPECT(sigaction(SIGRTMIN, &action, NULL) == 0);
    EXPECT(sigaction(SIGUSR2, &action, NULL) == 0);
    action.sa_handler = count_alarm;
    EXPECT(sigaction(SIGALRM, &action, NULL) == 0);
    action.sa_handler = own_kick;
    EXPECT(sigaction(SIGUSR1, &action, NULL) == 0);
    struct itimerval every = {.it_interval.tv_usec = 7000, .it_value.tv_usec = 7000};
    EXPECT(setitimer(ITIMER_REAL, &every, NULL) == 0);
}

/* ---- vCPUs and a device ------------------------------------------------------------------- */

static void handle_exit(int n)
{
    if (runs[n]->exit_reason == KVM_EXIT_IO) {
        turns[n]++;
        sleep_ms(3); /* the engine takes only what CPU time is left */
    } else if (runs[n]->exit_reason != KVM_EXIT_INTR) {
        fprintf(stderr, "vCPU %d: exit %u\n", n, runs[n]->exit_reason);
        exit(1);
    }
}

static void *vcpu_thread(void *argument)
{
    int n = (int)(intptr_t)argument;
    sigset_t before, after;
    memset(&before, 0, sizeof before);
    memset(&after, 0, sizeof after);
    pthread_sigmask(SIG_SETMASK, NULL, &before);
    REFUSED(lvp_guest_vcpu_gate(guest, (uint32_t)n), LVP_E_STATE);
    CHECK(lvp_guest_vcpu_enter(guest, (uint32_t)n, vcpu_fds[n]));
    REFUSED(lvp_guest_vcpu_enter(guest, (uint32_t)n, vcpu_fds[n]), LVP_E_STATE);
    while (!stop) {
        lvp_gate next = lvp_guest_vcpu_gate(guest, (uint32_t)n);
        EXPECT(next >= 0);
        if (next == LVP_GATE_ENTER) {
            EXPECT(!in_pause);
            if (ioctl(vcpu_fds[n], KVM_RUN, 0) < 0) {
                EXPECT(errno == EINTR || errno == EAGAIN);
                runs[n]->immediate_exit = 0;
                continue;
            }
        }
        handle_exit(n);
    }
    lvp_gate left;
    while ((left = lvp_guest_vcpu_leave(guest, (uint32_t)n)) == LVP_GATE_HANDLE_EXIT)
        handle_exit(n);
    EXPECT(left == LVP_OK);
    REFUSED(lvp_guest_vcpu_leave(guest, (uint32_t)n), LVP_E_STATE);
    pthread_sigmask(SIG_SETMASK, NULL, &after);
    EXPECT(memcmp(&before, &after, sizeof before) == 0);
    return NULL;
}

static void mark_written(uint64_t gpa)
{
    if (variant->own_dirty_log)
        device_dirty[gpa / PAGE / 64] |= UINT64_C(1) << (gpa / PAGE % 64);
    else
        CHECK(lvp_guest_mark_dirty(guest, gpa + 8, sizeof gpa));
}

static lvp_status give_back(void *data)
{
    uint8_t *page = data;
    EXPECT(madvise(page, PAGE, MADV_DONTNEED) == 0);
    return *(volatile uint8_t *)page == 0 ? LVP_OK : -1;
}

/* Writes its pages as a device does; KVM does not see it. */
static void *device_thread(void *unused)
{
    (void)unused;
    for (uint64_t value = 1; !stop; value++) {
        uint64_t gpa = DEVICE_GPA + value % DEVICE_PAGES * PAGE;
        pthread_mutex_lock(&device_lock);
        EXPECT(!in_pause);
        memcpy(memory + gpa + 8, &value, sizeof value);
        mark_written(gpa);
        /* A balloon's page: given back if it was written, else written. */
        gpa = BALLOON_GPA + value % BALLOON_PAGES * PAGE;
        if (value / BALLOON_PAGES % 2) {
            CHECK(lvp_guest_discard(guest, gpa, PAGE, give_back, memory + gpa));
        } else {
            memcpy(memory + gpa + 8, &value, sizeof value);
            mark_written(gpa);
        }
        pthread_mutex_unlock(&device_lock);
        device_turns++;
        if (value % 64 == 0)
            sleep_ms(1);
    }
    return NULL;
}

/* ---- Callbacks ---------------------------------------------------------------------------- */

static lvp_status pause_vmm(void *data)
{
    EXPECT(data == &variant);
    pauses++;
    return LVP_OK;
}

static lvp_status quiesce(void *data, uint32_t timeout_ms)
{
    EXPECT(data == &variant && timeout_ms > 0);
    pthread_mutex_lock(&device_lock);
    in_pause = 1;
    quiesces++;
    return LVP_OK;
}

static lvp_status save_state(void *data, lvp_state *state)
{
    EXPECT(data == &variant && in_pause);
    if (save_fails)
        return -7;
    CHECK(lvp_kvm_state_save(state, vm, vcpu_fds, VCPUS));
    REFUSED(lvp_kvm_state_save(state, vm, vcpu_fds, VCPUS), LVP_E_INVALID);
    REFUSED(lvp_state_add(state, "vcpu", 9, 1, "x", 1), LVP_E_INVALID);
    memcpy(frozen, memory, MEMORY_BYTES);
    unsigned long long counted = turns[0];
    return lvp_state_add(state, "turns", 0, 1, &counted, sizeof counted);
}

static void resume(void *data)
{
    EXPECT(data == &variant);
    resumes++;
    if (in_pause) {
        in_pause = 0;
        pthread_mutex_unlock(&device_lock);
    }
}

static void kick(void *data, uint32_t vcpu)
{
    EXPECT(data == &variant && vcpu < VCPUS);
    runs[vcpu]->immediate_exit = 1;
    pthread_kill(threads[vcpu], SIGUSR1);
}

static void host_dirty(void *data, uint32_t slot, uint64_t *bitmap, size_t words)
{
    EXPECT(data == &variant);
    if (slot != 3)
        return;
    EXPECT(words == sizeof device_dirty / sizeof device_dirty[0]);
    for (size_t word = 0; word < words; word++)
        bitmap[word] |= atomic_exchange(&device_dirty[word], 0);
}

/* ---- The test ----------------------------------------------------------------------------- */

static lvp_guest_region region(void *hva, uint64_t gpa, uint64_t bytes, uint32_t slot)
{
    lvp_guest_region region = {
        .struct_size = sizeof region, .gpa = gpa, .hva = hva, .bytes = bytes, .slot = slot};
    return region;
}

static lvp_status new_and_free(const lvp_guest_options *options,
                               const lvp_guest_callbacks *callbacks)
{
    lvp_guest *made = NULL;
    lvp_status status = lvp_guest_new(options, callbacks, &made);
    EXPECT((made != NULL) == (status == LVP_OK));
    lvp_guest_free(made);
    return status;
}

static lvp_status add_and_remove(lvp_guest *made, const lvp_guest_region *options)
{
    lvp_status status = lvp_guest_add_region(made, options);
    if (status == LVP_OK)
        CHECK(lvp_guest_remove_region(made, options->slot));
    return status;
}

/* What headers of other versions have for the structs of guests. */
static void other_headers(const char *image_path)
{
    lvp_guest_options plain = {.struct_size = sizeof plain, .vm_fd = vm};
    lvp_guest_callbacks none = {.user_data = &variant};
    OPTIONS_GROW(lvp_guest_options, 48, plain, new_and_free(options, NULL), LVP_OK);
    OPTIONS_GROW(lvp_guest_callbacks, 64, none, new_and_free(&plain, options), LVP_OK);
    lvp_guest *made = NULL;
    CHECK(lvp_guest_new(&plain, NULL, &made));
    OPTIONS_GROW(lvp_guest_region, 48, region(memory, 0, MEMORY_BYTES, 3),
                 add_and_remove(made, options), LVP_OK);
    lvp_image *image = NULL;
    CHECK(lvp_image_open(image_path, &image));
    lvp_guest_region other = region(memory, 0, PAGE, 3);
    CHECK(lvp_guest_add_region(made, &other));
    lvp_fill_options fill = {.threads = 1};
    /* The image has other regions. */
    OPTIONS_GROW(lvp_fill_options, 16, fill, lvp_guest_fill(made, image, options), LVP_E_INVALID);
    lvp_image_free(image);
    lvp_guest_free(made);
}

static void register_guest(void)
{
    lvp_guest_options options = {.struct_size = sizeof options,
                                 .vm_fd = vm,
                                 .vcpu_count = VCPUS,
                                 .kick_signal = variant->kick_signal,
                                 .name = variant->name,
                                 .uuid = "11111111-2222-4333-8444-555555555555"};
    lvp_guest_callbacks callbacks = {.struct_size = sizeof callbacks,
                                     .user_data = &variant,
                                     .pause = pause_vmm,
                                     .quiesce = quiesce,
                                     .save_state = save_state,
                                     .resume = resume,
                                     .kick = variant->own_kick ? kick : NULL,
                                     .host_dirty = variant->own_dirty_log ? host_dirty : NULL};
    CHECK(lvp_guest_new(&options, &callbacks, &guest));
    lvp_guest_region main_memory = region(memory, 0, MEMORY_BYTES, 3);
    CHECK(lvp_guest_add_region(guest, &main_memory));
    REFUSED(lvp_guest_add_region(guest, &main_memory), LVP_E_INVALID);
}

static lvp_job *start_checkpoint(const char *path)
{
    lvp_checkpoint_options options = {.struct_size = sizeof options,
                                      .protocol = variant->protocol,
                                      .pause_limit_ms = 30000 /* a loaded machine */};
    lvp_job *job;
    CHECK(lvp_guest_checkpoint(guest, path, &options, &job));
    return job;
}

static void finish(lvp_job *job)
{
    if (lvp_job_wait(job, -1) != LVP_OK) {
        fprintf(stderr, "%s: %s\n", variant->name, lvp_job_error(job));
        exit(1);
    }
    char *json = NULL;
    CHECK(lvp_job_inspect(job, &json));
    EXPECT(strstr(json, "\"downtime_us\"") != NULL);
    lvp_string_free(json);
    lvp_job_free(job);
}

/* Every page of the image is that of the moment of the pause. */
static void compare(const char *path, size_t ranges)
{
    lvp_image *image;
    CHECK(lvp_image_open(path, &image));
    CHECK(lvp_image_verify(image));
    EXPECT(lvp_image_range_count(image) == ranges);
    uint8_t *saved = malloc(MEMORY_BYTES);
    CHECK(lvp_image_read(image, 0, saved, MEMORY_BYTES));
    for (size_t at = 0; at < MEMORY_BYTES; at += PAGE)
        if (memcmp(saved + at, frozen + at, PAGE) != 0) {
            fprintf(stderr, "%s: page %#zx is not of the moment\n", variant->name, at);
            exit(1);
        }
    if (ranges == 2) {
        uint64_t word = 0;
        CHECK(lvp_image_read(image, EXTRA_GPA + EXTRA_BYTES - 8, &word, sizeof word));
        EXPECT(word == 0x1122334455667788);
        REFUSED(lvp_image_read(image, EXTRA_GPA + EXTRA_BYTES - 4, &word, 8), LVP_E_NOT_FOUND);
    } else {
        uint64_t word = 0;
        REFUSED(lvp_image_read(image, EXTRA_GPA, &word, sizeof word), LVP_E_NOT_FOUND);
    }
    lvp_state *state;
    lvp_section section = {.struct_size = sizeof section};
    CHECK(lvp_image_state(image, &state));
    CHECK(lvp_state_find(state, "turns", 0, &section));
    EXPECT(section.bytes == 8 && section.version == 1 && strcmp(section.kind, "turns") == 0);
    CHECK(lvp_state_find(state, "vcpu", VCPUS - 1, &section));
    /* This VM has no interrupt controller in KVM. */
    REFUSED(lvp_state_find(state, "irqchip", 0, &section), LVP_E_NOT_FOUND);
    lvp_state_free(state);
    lvp_image_free(image);
    free(saved);
}

static void hotplug(const char *path)
{
    int fd = memfd_create("extra", MFD_CLOEXEC);
    EXPECT(fd > 0 && ftruncate(fd, EXTRA_BYTES) == 0);
    extra = mmap(NULL, EXTRA_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    EXPECT(extra != MAP_FAILED);
    uint64_t word = 0x1122334455667788;
    memcpy(extra + EXTRA_BYTES - 8, &word, sizeof word);
    struct kvm_userspace_memory_region slot = {.slot = 9,
                                               .guest_phys_addr = EXTRA_GPA,
                                               .memory_size = EXTRA_BYTES,
                                               .userspace_addr = (uintptr_t)extra};
    EXPECT(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &slot) == 0);
    lvp_guest_region added = region(extra, EXTRA_GPA, EXTRA_BYTES, 9);
    added.fd = fd;
    lvp_guest_region overlapping = region(extra, MEMORY_BYTES - PAGE, EXTRA_BYTES, 9);
    REFUSED(lvp_guest_add_region(guest, &overlapping), LVP_E_INVALID);
    CHECK(lvp_guest_add_region(guest, &added));
    lvp_job *job = start_checkpoint(path);
    /* While it runs, memory stays as it is. Where it has ended already, nothing is refused. */
    lvp_status status = lvp_guest_remove_region(guest, 9);
    EXPECT(status == LVP_E_BUSY || lvp_job_wait(job, 0) == LVP_OK);
    finish(job);
    if (status == LVP_E_BUSY) {
        compare(path, 2);
        CHECK(lvp_guest_remove_region(guest, 9));
    }
    REFUSED(lvp_guest_remove_region(guest, 9), LVP_E_INVALID);
    slot.memory_size = 0;
    EXPECT(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &slot) == 0);
    EXPECT(munmap(extra, EXTRA_BYTES) == 0);
    close(fd);
}

static atomic_int discard_began, discard_may_end;

static lvp_status slow_give_back(void *data)
{
    EXPECT(data == &variant);
    discard_began = 1;
    while (!discard_may_end)
        sleep_ms(1);
    EXPECT(madvise(memory + BALLOON_GPA, BALLOON_PAGES * PAGE, MADV_DONTNEED) == 0);
    return 77;
}

static void *discard_slowly(void *unused)
{
    (void)unused;
    pthread_mutex_lock(&device_lock);
    EXPECT(lvp_guest_discard(guest, BALLOON_GPA, BALLOON_PAGES * PAGE, slow_give_back,
                             &variant) == 77);
    pthread_mutex_unlock(&device_lock);
    return NULL;
}

/* A checkpoint that begins in the middle of a discard waits for its end. */
static void discard_across_the_start(const char *path)
{
    pthread_mutex_lock(&device_lock);
    for (uint64_t page = 0; page < BALLOON_PAGES; page++) {
        memset(memory + BALLOON_GPA + page * PAGE, 0x5a, PAGE);
        mark_written(BALLOON_GPA + page * PAGE);
    }
    pthread_mutex_unlock(&device_lock);
    discard_began = discard_may_end = 0;
    pthread_t thread;
    EXPECT(pthread_create(&thread, NULL, discard_slowly, NULL) == 0);
    while (!discard_began)
        sleep_ms(1);
    int before = pauses;
    lvp_job *job = start_checkpoint(path);
    sleep_ms(200); /* time to do it wrong in */
    if (variant->protocol == LVP_PROTOCOL_COW)
        EXPECT(pauses == before);
    discard_may_end = 1;
    pthread_join(thread, NULL);
    finish(job);
    compare(path, 1);
}

static void expect_progress(void)
{
    for (int n = 0; n < VCPUS; n++) {
        unsigned long long before = turns[n];
        for (int waited = 0; turns[n] == before; waited++) {
            EXPECT(waited < 2000);
            sleep_ms(10);
        }
    }
}

/* A failed callback fails the checkpoint, and nothing else. */
static void fail_once(const char *path)
{
    save_fails = 1;
    lvp_job *job = start_checkpoint(path);
    EXPECT(lvp_job_wait(job, -1) == LVP_E_CALLBACK);
    EXPECT(strstr(lvp_job_error(job), "-7") != NULL);
    lvp_job_free(job);
    save_fails = 0;
    EXPECT(access(path, F_OK) != 0);
    expect_progress();
}

static void run_variant(const char *dir)
{
    char path[4096];
    for (int n = 0; n < VCPUS; n++)
        set_vcpu(n);
    register_guest();
    stop = 0;
    pauses = quiesces = resumes = 0;
    pthread_t device;
    for (int n = 0; n < VCPUS; n++)
        EXPECT(pthread_create(&threads[n], NULL, vcpu_thread, (void *)(intptr_t)n) == 0);
    EXPECT(pthread_create(&device, NULL, device_thread, NULL) == 0);
    expect_progress();
    REFUSED(lvp_guest_vcpu_leave(guest, 0), LVP_E_STATE); /* another thread's */
    REFUSED(lvp_guest_vcpu_gate(guest, VCPUS), LVP_E_INVALID);
    REFUSED(lvp_guest_discard(guest, 0, PAGE, NULL, NULL), LVP_E_INVALID);
    REFUSED(lvp_guest_discard(guest, UINT64_MAX, 2, give_back, NULL), LVP_E_INVALID);
    REFUSED(lvp_guest_mark_dirty(guest, UINT64_MAX - 1, PAGE), LVP_E_INVALID);

    snprintf(path, sizeof path, "%s/%s-fails.lpi", dir, variant->name);
    fail_once(path);
    snprintf(path, sizeof path, "%s/%s.lpi", dir, variant->name);
    for (int round = 0; round < 3; round++) {
        finish(start_checkpoint(path));
        compare(path, 1);
        expect_progress();
    }
    discard_across_the_start(path);
    snprintf(path, sizeof path, "%s/%s-extra.lpi", dir, variant->name);
    hotplug(path);
    finish(start_checkpoint(path));
    compare(path, 1);
    expect_progress();
    EXPECT(pauses == resumes && quiesces <= pauses && quiesces >= 5);

    stop = 1;
    for (int n = 0; n < VCPUS; n++)
        pthread_join(threads[n], NULL);
    pthread_join(device, NULL);
    /* A guest that is freed ends its checkpoint; the job stays. */
    snprintf(path, sizeof path, "%s/%s-freed.lpi", dir, variant->name);
    lvp_job *job = start_checkpoint(path);
    lvp_guest_free(guest);
    lvp_status end = lvp_job_wait(job, 0);
    EXPECT(end == LVP_OK || end == LVP_E_CANCELLED);
    lvp_job_free(job);
    printf("%s: %d pauses, %llu writes of the device, %d alarms\n", variant->name, (int)pauses,
           (unsigned long long)device_turns, (int)alarms);
}

int main(int argc, char **argv)
{
    static const struct variant variants[] = {
        {"threaded", 0, 0, 0, LVP_PROTOCOL_THREADED},
        {"cow", 0, 0, 0, LVP_PROTOCOL_COW},
        {"own-signal", 0 /* SIGUSR2, see below */, 0, 1, LVP_PROTOCOL_THREADED},
        {"own-kick", 0, 1, 0, LVP_PROTOCOL_THREADED},
        {"own-kick-stop", 0, 1, 1, LVP_PROTOCOL_STOP},
        {"precopy", 0, 0, 1, LVP_PROTOCOL_PRECOPY},
        {"auto", 0, 0, 0, LVP_PROTOCOL_AUTO},
    };
    EXPECT(argc == 2);
    install_handlers();
    make_vm();
    frozen = malloc(MEMORY_BYTES);
    EXPECT(frozen != NULL);
    memset(frozen, 1, MEMORY_BYTES);
    struct sigaction before[65], after;
    for (int signal = 1; signal <= 64; signal++)
        sigaction(signal, NULL, &before[signal]);
    for (size_t i = 0; i < sizeof variants / sizeof variants[0]; i++) {
        struct variant now = variants[i];
        if (strcmp(now.name, "own-signal") == 0)
            now.kick_signal = SIGUSR2;
        variant = &now;
        run_variant(argv[1]);
    }
    for (int signal = 1; signal <= 64; signal++)
        if (sigaction(signal, NULL, &after) == 0)
            EXPECT(after.sa_handler == before[signal].sa_handler &&
                   after.sa_flags == before[signal].sa_flags &&
                   memcmp(&after.sa_mask, &before[signal].sa_mask, 8) == 0);
    char path[4096];
    snprintf(path, sizeof path, "%s/auto.lpi", argv[1]);
    other_headers(path);
    EXPECT(strange_kicks == 0); /* the kicks ran no handler, although there are some */
    EXPECT(alarms > 0);         /* and the VMM's own signals still arrive */
    printf("foreign: done\n");
    return 0;
}
