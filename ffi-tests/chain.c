/* A chain of images from C: increments, back in place, machines that share memory, rebase, garbage.
 * Arguments: the ELF file of the guest npb, a directory. */
#define _GNU_SOURCE
#include "check.h"

#include <livepoint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { PATIENCE_MS = 300000 };

static char buffer[4][4096];

static const char *in(int number, const char *dir, const char *name)
{
    snprintf(buffer[number], sizeof buffer[number], "%s/%s", dir, name);
    return buffer[number];
}

/* Takes an incremental checkpoint into the directory and returns the image's path. */
static char *increment(lvp_machine *machine, const char *images)
{
    lvp_checkpoint_options options = {.struct_size = sizeof options,
                                      .protocol = LVP_PROTOCOL_COW,
                                      .no_sync = 1,
                                      .pause_limit_ms = 60000,
                                      .incremental = 1};
    lvp_job *job = NULL;
    const char *path = NULL;
    CHECK(lvp_machine_checkpoint(machine, images, &options, &job));
    CHECK(lvp_job_wait(job, PATIENCE_MS));
    CHECK(lvp_job_image(job, &path));
    char *copy = strdup(path);
    lvp_job_free(job);
    return copy;
}

static void finish(lvp_machine *machine)
{
    lvp_machine_state end = 0;
    CHECK(lvp_machine_wait(machine, PATIENCE_MS, &end));
    EXPECT(end == LVP_MACHINE_SHUTOFF);
    lvp_machine_free(machine);
}

static void back_in_place(lvp_machine *machine, const char *images, char *paths[2])
{
    REFUSED(lvp_machine_rewind(machine, NULL), LVP_E_INVALID);
    for (int i = 0; i < 2; i++)
        paths[i] = increment(machine, images);
    CHECK(lvp_machine_rewind(machine, NULL));
    CHECK(lvp_machine_rewind(machine, paths[0]));
    CHECK(lvp_machine_pause(machine));
    CHECK(lvp_machine_rewind(machine, paths[1]));
    lvp_machine_state state = 0;
    CHECK(lvp_machine_get_state(machine, &state));
    EXPECT(state == LVP_MACHINE_PAUSED);
    CHECK(lvp_machine_resume(machine));
    REFUSED(lvp_machine_rewind(machine, "/nonexistent/image"), LVP_E_NOT_FOUND);
}

static void shared(const char *image, const char *run)
{
    lvp_shared_memory *memory = NULL;
    CHECK(lvp_shared_memory_load(image, &memory));
    lvp_machine *clones[2] = {NULL, NULL};
    for (int i = 0; i < 2; i++) {
        lvp_machine_options options = {.struct_size = sizeof options,
                                       .runtime_dir = run,
                                       .new_name = i == 0 ? "one" : "two",
                                       .shared_memory = memory};
        CHECK(lvp_machine_restore(image, &options, &clones[i]));
        CHECK(lvp_machine_start(clones[i]));
    }
    lvp_shared_memory_free(memory);
    for (int i = 0; i < 2; i++)
        finish(clones[i]);
}

int main(int argc, char **argv)
{
    EXPECT(argc == 3);
    const char *dir = argv[2];
    const char *images = in(0, dir, "images"), *run = in(1, dir, "run");
    char xml[8192];
    snprintf(xml, sizeof xml,
             "<domain type='kvm'><name>chain</name><memory unit='MiB'>96</memory>"
             "<os><type arch='x86_64'>hvm</type><kernel>%s</kernel>"
             "<cmdline>kernel=mg class=W repeat=48</cmdline></os>"
             "<devices><serial type='file'><source path='%s/console' append='on'/>"
             "<target port='0'/></serial><memballoon model='none'/></devices></domain>",
             argv[1], dir);
    lvp_machine_options options = {.struct_size = sizeof options, .runtime_dir = run, .track = 1};
    lvp_machine *machine = NULL;
    REFUSED(lvp_machine_new(xml, &options, &machine), LVP_E_INVALID);
    options.track = 0;
    CHECK(lvp_machine_new(xml, &options, &machine));
    CHECK(lvp_machine_start(machine));
    char *paths[2];
    back_in_place(machine, images, paths);
    finish(machine);

    options.track = 1;
    options.lazy = 1;
    CHECK(lvp_machine_restore(paths[1], &options, &machine));
    CHECK(lvp_machine_start(machine));
    free(increment(machine, images));
    finish(machine);

    const char *whole = in(2, dir, "whole.lpi");
    CHECK(lvp_image_rebase(paths[1], whole, LVP_CODEC_ZSTD, 3));
    uint64_t removed = 99;
    CHECK(lvp_images_collect(images, 3, &removed));
    EXPECT(removed == 0);
    CHECK(lvp_images_collect(images, 1, NULL));
    REFUSED(lvp_images_collect(images, 0, NULL), LVP_E_INVALID);
    shared(whole, run);
    for (int i = 0; i < 2; i++)
        free(paths[i]);
    printf("chain: done\n");
    return 0;
}
