/*
 * The whole story from C: a machine runs, is checkpointed with both protocols while it runs, is
 * destroyed, and is restored from each image; it must then finish its work.
 *
 *     story DOMAIN.xml DIRECTORY RUNTIME_DIRECTORY
 *
 * Prints one line a step. The caller checks the guest's console, which the XML sends to a file.
 */
#include <livepoint.h>

#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static void fail(const char *what, lvp_status status)
{
    fprintf(stderr, "%s: status %d: %s\n", what, (int)status, lvp_error_message());
    exit(1);
}

#define CHECK(call)                       \
    do {                                  \
        lvp_status status_ = (call);      \
        if (status_ != LVP_OK)            \
            fail(#call, status_);         \
    } while (0)

#define EXPECT(condition)                                                         \
    do {                                                                          \
        if (!(condition)) {                                                       \
            fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition); \
            exit(1);                                                              \
        }                                                                         \
    } while (0)

static char *read_file(const char *path)
{
    FILE *file = fopen(path, "rb");
    EXPECT(file != NULL);
    char *text = calloc(1, 65536);
    EXPECT(text != NULL);
    size_t length = fread(text, 1, 65535, file);
    EXPECT(length > 0 && length < 65535);
    fclose(file);
    return text;
}

static void sleep_ms(long ms)
{
    struct timespec time = {.tv_sec = ms / 1000, .tv_nsec = ms % 1000 * 1000000};
    nanosleep(&time, NULL);
}

static lvp_machine_state state_of(const lvp_machine *machine)
{
    lvp_machine_state state = 0;
    CHECK(lvp_machine_get_state(machine, &state));
    return state;
}

/* Takes a checkpoint and waits for its end by poll(2). */
static void checkpoint(lvp_machine *machine, lvp_protocol protocol, const char *path)
{
    lvp_checkpoint_options options;
    memset(&options, 0, sizeof options);
    options.struct_size = sizeof options;
    options.protocol = protocol;

    lvp_job *job = NULL;
    CHECK(lvp_machine_checkpoint(machine, path, &options, &job));
    EXPECT(job != NULL);

    struct pollfd done = {.fd = lvp_job_fd(job), .events = POLLIN};
    EXPECT(done.fd >= 0);
    lvp_progress progress = {.struct_size = sizeof progress};
    CHECK(lvp_job_progress(job, &progress));
    EXPECT(progress.scanned_bytes <= progress.total_bytes);
    EXPECT(poll(&done, 1, 300000) == 1);
    CHECK(lvp_job_wait(job, 0));

    lvp_statistics statistics = {.struct_size = sizeof statistics};
    CHECK(lvp_job_statistics(job, &statistics));
    EXPECT(statistics.downtime_us > 0 && statistics.downtime_us <= statistics.total_us);
    EXPECT(statistics.image_bytes > 0);
    const char *image = NULL;
    CHECK(lvp_job_image(job, &image));
    EXPECT(strcmp(image, path) == 0);
    EXPECT(strcmp(lvp_job_error(job), "") == 0);
    printf("checkpoint %u: downtime %llu us, %llu us in all, %llu bytes\n", (unsigned)protocol,
           (unsigned long long)statistics.downtime_us, (unsigned long long)statistics.total_us,
           (unsigned long long)statistics.image_bytes);
    lvp_job_free(job);
}

/* A cancelled checkpoint leaves no image and a running machine; it may also win the race. */
static void cancel(lvp_machine *machine, const char *path)
{
    lvp_job *job = NULL;
    CHECK(lvp_machine_checkpoint(machine, path, NULL, &job));
    CHECK(lvp_job_cancel(job));
    lvp_status status = lvp_job_wait(job, 300000);
    EXPECT(status == LVP_E_CANCELLED || status == LVP_OK);
    if (status == LVP_E_CANCELLED) {
        EXPECT(strlen(lvp_job_error(job)) > 0);
        const char *image = NULL;
        EXPECT(lvp_job_image(job, &image) == LVP_E_CANCELLED && image == NULL);
        EXPECT(fopen(path, "rb") == NULL);
    }
    lvp_job_free(job);
    EXPECT(state_of(machine) == LVP_MACHINE_RUNNING);
    printf("cancel: status %d\n", (int)status);
}

static void restore_and_finish(const char *path, const lvp_machine_options *options)
{
    lvp_machine *machine = NULL;
    CHECK(lvp_machine_restore(path, options, &machine));
    CHECK(lvp_machine_start(machine));
    lvp_machine_state end = 0;
    CHECK(lvp_machine_wait(machine, 600000, &end));
    EXPECT(end == LVP_MACHINE_SHUTOFF);
    lvp_machine_free(machine);
    printf("restored %s and finished\n", path);
}

static void refusals(const char *xml, const lvp_machine_options *options)
{
    lvp_machine *machine = NULL;
    EXPECT(lvp_machine_new(NULL, options, &machine) == LVP_E_INVALID && machine == NULL);
    EXPECT(lvp_machine_new(xml, options, NULL) == LVP_E_INVALID);
    EXPECT(lvp_machine_new("<domain", options, &machine) == LVP_E_INVALID && machine == NULL);
    EXPECT(strlen(lvp_error_message()) > 0);
    EXPECT(lvp_machine_start(NULL) == LVP_E_INVALID);
    EXPECT(lvp_machine_restore("/nonexistent/image", options, &machine) != LVP_OK);
    EXPECT(lvp_job_wait(NULL, 0) == LVP_E_INVALID);
    EXPECT(lvp_job_fd(NULL) == -1);
    EXPECT(lvp_job_error(NULL) == NULL);
    lvp_machine_free(NULL);
    lvp_job_free(NULL);

    lvp_machine_options unset;
    memset(&unset, 0, sizeof unset);
    EXPECT(lvp_machine_new(xml, &unset, &machine) == LVP_E_INVALID && machine == NULL);
    printf("refusals: as documented\n");
}

int main(int argc, char **argv)
{
    if (argc != 4) {
        fprintf(stderr, "usage: story DOMAIN.xml DIRECTORY RUNTIME_DIRECTORY\n");
        return 2;
    }
    EXPECT(lvp_version() == LVP_VERSION_NUMBER);
    EXPECT(strcmp(lvp_version_string(), LVP_VERSION_STRING) == 0);
    EXPECT(LVP_VERSION_NUMBER ==
           (LVP_VERSION_MAJOR << 16 | LVP_VERSION_MINOR << 8 | LVP_VERSION_PATCH));

    char *xml = read_file(argv[1]);
    lvp_machine_options options;
    memset(&options, 0, sizeof options);
    options.struct_size = sizeof options;
    options.runtime_dir = argv[3];
    refusals(xml, &options);

    char stop[4096], threaded[4096], cancelled[4096];
    snprintf(stop, sizeof stop, "%s/stop.lpi", argv[2]);
    snprintf(threaded, sizeof threaded, "%s/threaded.lpi", argv[2]);
    snprintf(cancelled, sizeof cancelled, "%s/cancelled.lpi", argv[2]);

    lvp_machine *machine = NULL;
    CHECK(lvp_machine_new(xml, &options, &machine));
    EXPECT(state_of(machine) == LVP_MACHINE_CREATED);
    EXPECT(lvp_machine_pause(machine) == LVP_E_STATE);
    EXPECT(lvp_machine_wait(machine, 0, NULL) == LVP_E_STATE);
    CHECK(lvp_machine_start(machine));
    EXPECT(state_of(machine) == LVP_MACHINE_RUNNING);
    EXPECT(lvp_machine_wait(machine, 50, NULL) == LVP_E_TIMEOUT);

    sleep_ms(300);
    cancel(machine, cancelled);
    checkpoint(machine, LVP_PROTOCOL_STOP, stop);
    EXPECT(state_of(machine) == LVP_MACHINE_RUNNING);
    checkpoint(machine, LVP_PROTOCOL_THREADED, threaded);
    EXPECT(state_of(machine) == LVP_MACHINE_RUNNING);

    CHECK(lvp_machine_pause(machine));
    EXPECT(state_of(machine) == LVP_MACHINE_PAUSED);
    EXPECT(lvp_machine_pause(machine) == LVP_E_STATE);
    CHECK(lvp_machine_resume(machine));
    EXPECT(lvp_machine_resume(machine) == LVP_E_STATE);

    CHECK(lvp_machine_destroy(machine));
    EXPECT(state_of(machine) == LVP_MACHINE_SHUTOFF);
    EXPECT(lvp_machine_destroy(machine) == LVP_E_STATE);
    lvp_machine_free(machine);
    printf("destroyed\n");

    restore_and_finish(stop, &options);
    restore_and_finish(threaded, &options);
    free(xml);
    printf("story: done\n");
    return 0;
}
