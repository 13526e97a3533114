/*
 * Every function that needs no running guest, as the header allows and as it does not: NULL,
 * sizes that were never set, wrong states, hostile values, files that are no images.
 *
 *     every IMAGE DIRECTORY
 *
 * IMAGE is a whole image of a guest. Needs no KVM. A handle that was freed is not tried: the
 * header says that the library cannot tell.
 */
#include "check.h"

#include <limits.h>

static char path[4096];
static const char *in(const char *dir, const char *name)
{
    snprintf(path, sizeof path, "%s/%s", dir, name);
    return path;
}

static void null_everywhere(void)
{
    lvp_machine *machine = NULL;
    lvp_machine_state state = 0;
    lvp_job *job = NULL;
    lvp_events *events = NULL;
    lvp_event event = {.struct_size = sizeof event};
    lvp_image *image = NULL;
    lvp_state *bag = NULL;
    char *text = NULL;
    const char *lent = NULL;
    int fd = 0;
    uint64_t word = 0;

    REFUSED(lvp_machine_new(NULL, NULL, &machine), LVP_E_INVALID);
    REFUSED(lvp_machine_restore(NULL, NULL, &machine), LVP_E_INVALID);
    REFUSED(lvp_machine_restore("/", NULL, NULL), LVP_E_INVALID);
    REFUSED(lvp_machine_start(NULL), LVP_E_INVALID);
    REFUSED(lvp_machine_pause(NULL), LVP_E_INVALID);
    REFUSED(lvp_machine_resume(NULL), LVP_E_INVALID);
    REFUSED(lvp_machine_reset(NULL), LVP_E_INVALID);
    REFUSED(lvp_machine_shutdown(NULL), LVP_E_INVALID);
    REFUSED(lvp_machine_destroy(NULL), LVP_E_INVALID);
    REFUSED(lvp_machine_get_state(NULL, &state), LVP_E_INVALID);
    REFUSED(lvp_machine_wait(NULL, 0, &state), LVP_E_INVALID);
    REFUSED(lvp_machine_xml(NULL, &text), LVP_E_INVALID);
    REFUSED(lvp_machine_inspect(NULL, &text), LVP_E_INVALID);
    REFUSED(lvp_machine_console(NULL, 0, &fd), LVP_E_INVALID);
    REFUSED(lvp_machine_console(NULL, 0, NULL), LVP_E_INVALID);
    REFUSED(lvp_machine_events(NULL, NULL, NULL, &events), LVP_E_INVALID);
    REFUSED(lvp_machine_events(NULL, NULL, NULL, NULL), LVP_E_INVALID);
    REFUSED(lvp_events_next(NULL, 0, &event), LVP_E_INVALID);
    EXPECT(lvp_events_fd(NULL) == -1);
    REFUSED(lvp_log_set(NULL, NULL, 5), LVP_E_INVALID);
    REFUSED(lvp_machine_checkpoint(NULL, "x", NULL, &job), LVP_E_INVALID);
    REFUSED(lvp_machine_rewind(NULL, NULL), LVP_E_INVALID);
    lvp_shared_memory *memory = NULL;
    REFUSED(lvp_shared_memory_load(NULL, &memory), LVP_E_INVALID);
    REFUSED(lvp_shared_memory_load("/", NULL), LVP_E_INVALID);
    lvp_shared_memory_free(NULL);
    REFUSED(lvp_image_rebase(NULL, "x", 0, 0), LVP_E_INVALID);
    REFUSED(lvp_image_rebase("/", NULL, 0, 0), LVP_E_INVALID);
    REFUSED(lvp_image_rebase("/", "x", 99, 0), LVP_E_INVALID);
    REFUSED(lvp_images_collect(NULL, 1, &word), LVP_E_INVALID);
    REFUSED(lvp_job_wait(NULL, 0), LVP_E_INVALID);
    REFUSED(lvp_job_cancel(NULL), LVP_E_INVALID);
    REFUSED(lvp_job_progress(NULL, NULL), LVP_E_INVALID);
    REFUSED(lvp_job_statistics(NULL, NULL), LVP_E_INVALID);
    REFUSED(lvp_job_inspect(NULL, &text), LVP_E_INVALID);
    REFUSED(lvp_job_image(NULL, &lent), LVP_E_INVALID);
    EXPECT(lvp_job_fd(NULL) == -1 && lvp_job_error(NULL) == NULL && lvp_job_number(NULL) == 0);
    REFUSED(lvp_guest_new(NULL, NULL, NULL), LVP_E_INVALID);
    REFUSED(lvp_guest_add_region(NULL, NULL), LVP_E_INVALID);
    REFUSED(lvp_guest_remove_region(NULL, 0), LVP_E_INVALID);
    REFUSED(lvp_guest_checkpoint(NULL, "x", NULL, &job), LVP_E_INVALID);
    REFUSED(lvp_guest_fill(NULL, NULL, NULL), LVP_E_INVALID);
    REFUSED(lvp_guest_vcpu_enter(NULL, 0, 0), LVP_E_INVALID);
    REFUSED(lvp_guest_vcpu_gate(NULL, 0), LVP_E_INVALID);
    REFUSED(lvp_guest_vcpu_leave(NULL, 0), LVP_E_INVALID);
    REFUSED(lvp_guest_mark_dirty(NULL, 0, 1), LVP_E_INVALID);
    REFUSED(lvp_guest_discard(NULL, 0, 1, NULL, NULL), LVP_E_INVALID);
    REFUSED(lvp_image_open(NULL, &image), LVP_E_INVALID);
    REFUSED(lvp_image_open("/", NULL), LVP_E_INVALID);
    REFUSED(lvp_image_inspect(NULL, &text), LVP_E_INVALID);
    REFUSED(lvp_image_description(NULL, &text), LVP_E_INVALID);
    REFUSED(lvp_image_verify(NULL), LVP_E_INVALID);
    REFUSED(lvp_image_check_host(NULL), LVP_E_INVALID);
    REFUSED(lvp_image_get_range(NULL, 0, NULL), LVP_E_INVALID);
    REFUSED(lvp_image_read(NULL, 0, &word, 8), LVP_E_INVALID);
    REFUSED(lvp_image_export(NULL, "x"), LVP_E_INVALID);
    REFUSED(lvp_image_section(NULL, 0, NULL), LVP_E_INVALID);
    REFUSED(lvp_image_state(NULL, &bag), LVP_E_INVALID);
    EXPECT(lvp_image_range_count(NULL) == 0 && lvp_image_section_count(NULL) == 0);
    REFUSED(lvp_state_new(NULL), LVP_E_INVALID);
    REFUSED(lvp_state_add(NULL, "x", 0, 0, "", 0), LVP_E_INVALID);
    REFUSED(lvp_state_find(NULL, "x", 0, NULL), LVP_E_INVALID);
    REFUSED(lvp_state_section(NULL, 0, NULL), LVP_E_INVALID);
    EXPECT(lvp_state_section_count(NULL) == 0);
    REFUSED(lvp_kvm_state_save(NULL, 0, &fd, 1), LVP_E_INVALID);
    REFUSED(lvp_kvm_state_restore(NULL, 0, &fd, 1, LVP_CLOCK_CONTINUE), LVP_E_INVALID);
    REFUSED(lvp_domain_check(NULL, &text, NULL), LVP_E_INVALID);
    lvp_machine_free(NULL);
    lvp_job_free(NULL);
    lvp_events_free(NULL);
    lvp_guest_free(NULL);
    lvp_image_free(NULL);
    lvp_state_free(NULL);
    lvp_string_free(NULL);
    /* Nothing was written: out-parameters are, on success alone. */
    EXPECT(!machine && !state && !job && !events && !event.kind && !image && !bag && !text && !lent && word == 0);
}

static const char minimal[] =
    "<domain type='kvm'>\n <name>n</name>\n <memory unit='MiB'>64</memory>\n"
    " <os><type arch='x86_64'>hvm</type><kernel>/nonexistent</kernel></os>\n</domain>";

static lvp_status new_and_free(const lvp_machine_options *options)
{
    lvp_machine *machine = NULL;
    lvp_status status = lvp_machine_new(minimal, options, &machine);
    EXPECT((machine != NULL) == (status == LVP_OK));
    lvp_machine_free(machine);
    return status;
}

static void domains(const char *dir)
{
    char *canonical = NULL, *again = NULL;
    lvp_xml_place place = {.struct_size = sizeof place};
    CHECK(lvp_domain_check(minimal, &canonical, &place));
    EXPECT(place.line == 0 && strstr(canonical, "<name>n</name>") != NULL);
    /* The canonical form is its own canonical form. */
    CHECK(lvp_domain_check(canonical, &again, NULL));
    EXPECT(strcmp(canonical, again) == 0);
    lvp_string_free(again);
    lvp_string_free(canonical);
    canonical = NULL;
    REFUSED(lvp_domain_check("<domain type='kvm'>\n <nonsense/>\n</domain>", &canonical, &place),
            LVP_E_INVALID);
    EXPECT(canonical == NULL && place.line == 2 && strcmp(place.element, "nonsense") == 0);
    RESULT_GROWS(lvp_xml_place, 80, lvp_domain_check("<nonsense/>", NULL, result), LVP_E_INVALID);
    lvp_machine_options growing = {.runtime_dir = dir};
    OPTIONS_GROW(lvp_machine_options, 16, growing, new_and_free(options), LVP_OK);
    REFUSED(lvp_domain_check("<domain", NULL, NULL), LVP_E_INVALID);
    REFUSED(lvp_domain_check("\xff\xfe", NULL, NULL), LVP_E_INVALID);

    lvp_machine_options options = {.struct_size = sizeof options, .runtime_dir = dir};
    lvp_machine *machine = NULL;
    CHECK(lvp_machine_new(minimal, &options, &machine));
    lvp_machine_state state = 0;
    CHECK(lvp_machine_get_state(machine, &state));
    EXPECT(state == LVP_MACHINE_CREATED);
    REFUSED(lvp_machine_get_state(machine, NULL), LVP_E_INVALID);
    /* Events can be watched from the beginning on, and outlive the machine. */
    lvp_events *events = NULL;
    lvp_event event = {.struct_size = sizeof event};
    CHECK(lvp_machine_events(machine, NULL, NULL, &events));
    EXPECT(lvp_events_fd(events) >= 0);
    REFUSED(lvp_events_next(events, 0, NULL), LVP_E_INVALID);
    event.struct_size = 39;
    REFUSED(lvp_events_next(events, 0, &event), LVP_E_INVALID);
    event.struct_size = sizeof event;
    REFUSED(lvp_events_next(events, 0, &event), LVP_E_TIMEOUT);
    int fd = -1;
    REFUSED(lvp_machine_console(machine, 0, &fd), LVP_E_STATE);
    EXPECT(fd == -1);
    lvp_job *job = NULL;
    REFUSED(lvp_machine_pause(machine), LVP_E_STATE);
    REFUSED(lvp_machine_resume(machine), LVP_E_STATE);
    REFUSED(lvp_machine_reset(machine), LVP_E_STATE);
    REFUSED(lvp_machine_shutdown(machine), LVP_E_STATE);
    REFUSED(lvp_machine_destroy(machine), LVP_E_STATE);
    REFUSED(lvp_machine_wait(machine, 0, &state), LVP_E_STATE);
    REFUSED(lvp_machine_checkpoint(machine, "x", NULL, &job), LVP_E_STATE);
    REFUSED(lvp_machine_checkpoint(machine, NULL, NULL, &job), LVP_E_INVALID);
    REFUSED(lvp_machine_checkpoint(machine, "x", NULL, NULL), LVP_E_INVALID);
    lvp_checkpoint_options wrong[] = {
        {.struct_size = sizeof wrong[0], .protocol = 99},
        {.struct_size = sizeof wrong[0], .codec = 99},
        {.struct_size = sizeof wrong[0], .codec_level = 3},
        {.struct_size = sizeof wrong[0], .codec = LVP_CODEC_ZSTD, .codec_level = 1000},
        {.struct_size = sizeof wrong[0], .threads = UINT32_MAX},
        {.struct_size = sizeof wrong[0], .reserved = 1},
        {.struct_size = 47},
        {.struct_size = SIZE_MAX},
    };
    for (size_t i = 0; i < sizeof wrong / sizeof wrong[0]; i++)
        REFUSED(lvp_machine_checkpoint(machine, "x", &wrong[i], &job), LVP_E_INVALID);
    lvp_checkpoint_options plain = {.protocol = LVP_PROTOCOL_STOP};
    OPTIONS_GROW(lvp_checkpoint_options, 48, plain,
                 lvp_machine_checkpoint(machine, "x", options, &job), LVP_E_STATE);
    char *text = NULL;
    CHECK(lvp_machine_xml(machine, &text));
    EXPECT(strstr(text, "<domain") != NULL);
    lvp_string_free(text);
    CHECK(lvp_machine_inspect(machine, &text));
    EXPECT(strstr(text, "\"created\"") != NULL);
    lvp_string_free(text);
    EXPECT(job == NULL);
    lvp_machine_free(machine);
    REFUSED(lvp_events_next(events, -1, &event), LVP_E_NOT_FOUND);
    lvp_events_free(events);
}

static void states(void)
{
    lvp_state *state = NULL;
    lvp_section section = {.struct_size = sizeof section};
    CHECK(lvp_state_new(&state));
    CHECK(lvp_state_add(state, "disk", 2, 7, "abc", 3));
    CHECK(lvp_state_add(state, "empty", 0, 0, NULL, 0));
    REFUSED(lvp_state_add(state, "disk", 2, 7, "abc", 3), LVP_E_INVALID);
    REFUSED(lvp_state_add(state, "vcpu", 0, 1, "abc", 3), LVP_E_INVALID);
    REFUSED(lvp_state_add(state, "", 0, 1, "abc", 3), LVP_E_INVALID);
    REFUSED(lvp_state_add(state, "new", 0, 65536, "abc", 3), LVP_E_INVALID);
    REFUSED(lvp_state_add(state, "new", 0, 1, NULL, 3), LVP_E_INVALID);
    REFUSED(lvp_state_add(state, "new", 0, 1, "abc", SIZE_MAX), LVP_E_INVALID);
    REFUSED(lvp_state_add(state, NULL, 0, 1, "abc", 3), LVP_E_INVALID);
    EXPECT(lvp_state_section_count(state) == 2);
    CHECK(lvp_state_find(state, "disk", 2, &section));
    EXPECT(section.version == 7 && section.bytes == 3 && memcmp(section.data, "abc", 3) == 0);
    CHECK(lvp_state_section(state, 0, &section));
    REFUSED(lvp_state_section(state, 2, &section), LVP_E_NOT_FOUND);
    REFUSED(lvp_state_find(state, "disk", 0, &section), LVP_E_NOT_FOUND);
    RESULT_GROWS(lvp_section, 104, lvp_state_section(state, 0, result), LVP_OK);
    int fd = -1;
    REFUSED(lvp_kvm_state_save(state, -1, &fd, 1), LVP_E_INVALID);
    REFUSED(lvp_kvm_state_save(state, 0, &fd, 1), LVP_E_INVALID);
    REFUSED(lvp_kvm_state_save(state, 0, NULL, 1), LVP_E_INVALID);
    REFUSED(lvp_kvm_state_save(state, 0, &fd, 0), LVP_E_INVALID);
    REFUSED(lvp_kvm_state_save(state, 0, &fd, SIZE_MAX), LVP_E_INVALID);
    REFUSED(lvp_kvm_state_restore(state, 0, &fd, 1, 0), LVP_E_INVALID);
    fd = 0;
    REFUSED(lvp_kvm_state_restore(state, 0, &fd, 1, 9), LVP_E_INVALID);
    lvp_state_free(state);
}

static void images(const char *file, const char *dir)
{
    lvp_image *image = NULL;
    REFUSED(lvp_image_open("/nonexistent", &image), LVP_E_NOT_FOUND);
    FILE *junk = fopen(in(dir, "junk.lpi"), "wb");
    EXPECT(junk != NULL);
    for (int i = 0; i < 20000; i++)
        fputc(i * 31 & 0xff, junk);
    fclose(junk);
    REFUSED(lvp_image_open(in(dir, "junk.lpi"), &image), LVP_E_CORRUPT);
    EXPECT(image == NULL);
    CHECK(lvp_image_open(file, &image));
    CHECK(lvp_image_verify(image));
    /* Whether this host could run it does not matter here, only that it says which. */
    lvp_status fits = lvp_image_check_host(image);
    EXPECT(fits == LVP_OK || fits == LVP_E_INCOMPATIBLE || fits == LVP_E_HOST);
    lvp_status host = lvp_host_check();
    EXPECT(host == LVP_OK || host == LVP_E_HOST);
    char *text = NULL;
    CHECK(lvp_image_inspect(image, &text));
    EXPECT(strstr(text, "\"memory_bytes\"") != NULL);
    lvp_string_free(text);
    CHECK(lvp_image_description(image, &text));
    lvp_string_free(text);

    size_t ranges = lvp_image_range_count(image);
    EXPECT(ranges > 0);
    CHECK(lvp_image_export(image, in(dir, "flat")));
    FILE *flat = fopen(in(dir, "flat"), "rb");
    EXPECT(flat != NULL);
    for (size_t i = 0; i < ranges; i++) {
        lvp_image_range range = {.struct_size = sizeof range};
        CHECK(lvp_image_get_range(image, i, &range));
        unsigned char *memory = malloc(range.bytes), *exported = malloc(range.bytes);
        EXPECT(memory && exported);
        CHECK(lvp_image_read(image, range.gpa, memory, range.bytes));
        EXPECT(fseek(flat, (long)range.gpa, SEEK_SET) == 0);
        EXPECT(fread(exported, 1, range.bytes, flat) == range.bytes);
        EXPECT(memcmp(memory, exported, range.bytes) == 0);
        /* Small reads that begin and end inside pages find the same bytes. */
        for (size_t at = 1; at + 5000 < range.bytes; at += 4093 * 7) {
            CHECK(lvp_image_read(image, range.gpa + at, exported, 5000));
            EXPECT(memcmp(memory + at, exported, 5000) == 0);
        }
        REFUSED(lvp_image_read(image, range.gpa + 1, memory, 1ULL << 60), LVP_E_NOT_FOUND);
        REFUSED(lvp_image_read(image, UINT64_MAX - 4, memory, 8), LVP_E_INVALID);
        REFUSED(lvp_image_read(image, range.gpa, NULL, 8), LVP_E_INVALID);
        free(memory);
        free(exported);
    }
    fclose(flat);
    RESULT_GROWS(lvp_image_range, 32, lvp_image_get_range(image, 0, result), LVP_OK);
    lvp_image_range range = {.struct_size = sizeof range};
    REFUSED(lvp_image_get_range(image, ranges, &range), LVP_E_NOT_FOUND);
    REFUSED(lvp_image_export(image, "/nonexistent/flat"), LVP_E_NOT_FOUND);

    lvp_state *state = NULL;
    CHECK(lvp_image_state(image, &state));
    EXPECT(lvp_state_section_count(state) == lvp_image_section_count(image));
    for (size_t i = 0; i < lvp_image_section_count(image); i++) {
        lvp_section listed = {.struct_size = sizeof listed}, read = listed;
        CHECK(lvp_image_section(image, i, &listed));
        CHECK(lvp_state_find(state, listed.kind, listed.instance, &read));
        EXPECT(listed.data == NULL && read.data != NULL && listed.bytes == read.bytes);
    }
    lvp_state_free(state);
    lvp_machine *machine = NULL;
    lvp_machine_options options = {.struct_size = sizeof options, .runtime_dir = dir};
    REFUSED(lvp_machine_restore(in(dir, "junk.lpi"), &options, &machine), LVP_E_CORRUPT);
    lvp_image_free(image);
}

static void guests(void)
{
    lvp_guest *guest = NULL;
    lvp_guest_options options = {.struct_size = sizeof options, .vm_fd = -1};
    lvp_guest_callbacks callbacks = {.struct_size = sizeof callbacks};
    REFUSED(lvp_guest_new(&options, &callbacks, &guest), LVP_E_INVALID);
    callbacks.struct_size = 0;
    REFUSED(lvp_guest_new(&options, &callbacks, &guest), LVP_E_INVALID);
    callbacks.struct_size = sizeof callbacks;
    options.uuid = "no uuid";
    REFUSED(lvp_guest_new(&options, &callbacks, &guest), LVP_E_INVALID);
    options.uuid = NULL;
    options.name = "a\nb";
    REFUSED(lvp_guest_new(&options, &callbacks, &guest), LVP_E_INVALID);
    options.name = NULL;
    options.vm_fd = options.kvm_fd = 1; /* neither is KVM's */
    EXPECT(lvp_guest_new(&options, &callbacks, &guest) != LVP_OK);
    EXPECT(guest == NULL);
}

int main(int argc, char **argv)
{
    EXPECT(argc == 3);
    EXPECT(lvp_version() == LVP_VERSION_NUMBER);
    EXPECT(strcmp(lvp_version_string(), LVP_VERSION_STRING) == 0);
    EXPECT(strcmp(lvp_error_message(), "") == 0);
    null_everywhere();
    domains(argv[2]);
    states();
    images(argv[1], argv[2]);
    guests();
    printf("every: done\n");
    return 0;
}
