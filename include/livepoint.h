/*
 * livepoint: virtual machines on KVM that are saved while they keep running.
 *
 * Link with -llivepoint. Every function may be called from any thread. Text is UTF-8. Threads
 * that the library starts have every signal blocked; it installs no signal handler, keeps no
 * global state but each thread's last error text and lvp_log_set()'s, and never ends the process.
 *
 * Option and result structs start with struct_size: zero the struct, set struct_size to its
 * sizeof, then call. A library newer than the header then leaves out what the caller does not
 * know; an older one refuses what it does not know, unless it is zero.
 *
 * SPDX-License-Identifier: Apache-2.0 OR MIT
 */

#ifndef LIVEPOINT_H
#define LIVEPOINT_H

/* Generated from src/capi/ by cbindgen. */

#include <stddef.h>
#include <stdint.h>

/** The version of this header. */
#define LVP_VERSION_MAJOR 0
#define LVP_VERSION_MINOR 1
#define LVP_VERSION_PATCH 0
/** (major << 16 | minor << 8 | patch); compare with lvp_version(). */
#define LVP_VERSION_NUMBER 256
#define LVP_VERSION_STRING "0.1.0"

/**
 * Room for the name of an element, with the zero byte that ends it.
 */
#define LVP_XML_ELEMENT_SIZE 64

/**
 * Room for an event's text, with the zero byte that ends it.
 */
#define LVP_EVENT_TEXT_SIZE 256

/**
 * Longest name of a section, with the zero byte that ends it and room up to a multiple of 8.
 */
#define LVP_SECTION_KIND_SIZE 72

/**
 * The events of a machine from some moment on. Opaque; made by lvp_machine_events(), released by
 * lvp_events_free(). Every function may be called from any thread at any time, but none after or
 * while the handle is freed.
 */
typedef struct lvp_events lvp_events;

/**
 * A VM on KVM that the caller made and runs, registered for live checkpoints. Opaque; made by
 * lvp_guest_new(), released by lvp_guest_free(). Every function may be called from any thread at
 * any time, but none after or while the handle is freed.
 */
typedef struct lvp_guest lvp_guest;

/**
 * An image that is open for reading; nobody replaces or removes it meanwhile. Opaque; made by
 * lvp_image_open(), released by lvp_image_free(). Every function may be called from any thread at
 * any time, but none after or while the handle is freed.
 */
typedef struct lvp_image lvp_image;

/**
 * A checkpoint under way or done. Opaque; made by lvp_machine_checkpoint(), released by
 * lvp_job_free(). Every function may be called from any thread at any time, but none after or
 * while the handle is freed.
 */
typedef struct lvp_job lvp_job;

/**
 * A virtual machine. Opaque; made by lvp_machine_new() or lvp_machine_restore(), released by
 * lvp_machine_free(). Every function may be called from any thread at any time, but none after
 * or while the handle is freed.
 */
typedef struct lvp_machine lvp_machine;

/**
 * The memory of an image, for machines that share it until they write it. Opaque; made by
 * lvp_shared_memory_load(), released by lvp_shared_memory_free(). May be used by any thread.
 */
typedef struct lvp_shared_memory lvp_shared_memory;

/**
 * The state of a guest but for its memory: sections, each with a name, a number and a version.
 * Opaque; made by lvp_state_new() or lvp_image_state() and released by lvp_state_free(), or lent
 * to a save_state callback for its duration.
 */
typedef struct lvp_state lvp_state;

/**
 * What came of a call. Negative values are errors; a program must expect values that it does not
 * know, since later versions may add some. Values are never reused.
 */
typedef int32_t lvp_status;

/**
 * How important a message is: the lower, the more.
 */
typedef uint32_t lvp_log_level;

/**
 * Receives a message: `target` is the part of the library that says it, `message` is one line of
 * English. Both are the library's and valid during the call. Called from any thread, several at a
 * time, also while the library holds locks of its own: must not call the library but for
 * lvp_version(), and must not unwind or longjmp() out.
 */
typedef void (*lvp_log_callback)(void *user_data,
                                 lvp_log_level level,
                                 const char *target,
                                 const char *message);

/**
 * A place in a document. Set struct_size before the call.
 *
 * Since: 0.1
 */
typedef struct {
  /**
   * sizeof(lvp_xml_place), as the caller was compiled.
   */
  size_t struct_size;
  /**
   * Line, from 1.
   */
  uint32_t line;
  /**
   * Column in characters, from 1.
   */
  uint32_t column;
  /**
   * The element there, ended by a zero byte; empty where none is open. Cut where it is longer.
   */
  char element[LVP_XML_ELEMENT_SIZE];
} lvp_xml_place;

/**
 * Options of a machine. Zero the struct, set struct_size, then what you care about.
 *
 * Since: 0.1
 */
typedef struct {
  /**
   * sizeof(lvp_machine_options), as the caller was compiled.
   */
  size_t struct_size;
  /**
   * Directory of the locks that keep two processes from running one machine; NULL: the
   * default, which the livepoint command uses too. Borrowed for the call.
   */
  const char *runtime_dir;
  /**
   * Connected stream sockets, as of socketpair(2), at which the first serial ports are served
   * in place of what the domain XML says of them: from the guest's first byte on, and over
   * restarts. Duplicated; the caller keeps its own. Output that is not read is lost after 64 KiB
   * and 100 ms. NULL: none. Borrowed for the call.
   */
  const int *console_fds;
  /**
   * How many; at most as many as the machine has serial ports.
   */
  size_t console_count;
  /**
   * lvp_machine_restore(): another name, and with it a new UUID, so that several machines can run
   * from one image; NULL: those that were saved. Borrowed for the call.
   */
  const char *new_name;
  /**
   * lvp_machine_restore(): memory of the same image, which the machine shares with others until
   * it writes it; NULL: memory of its own. It may be released once the call has returned.
   */
  const lvp_shared_memory *shared_memory;
  /**
   * lvp_machine_restore(), not 0: the machine can run at once, and its memory comes as it is
   * touched. A damaged part of the image, found late, ends the machine with an error that names
   * it.
   */
  uint32_t lazy;
  /**
   * lvp_machine_restore(), not 0: the guest's writes are tracked from the first one on, so that
   * the first incremental checkpoint has only what was written since the image.
   */
  uint32_t track;
} lvp_machine_options;

/**
 * What a machine is doing. A program must expect values that it does not know.
 */
typedef uint32_t lvp_machine_state;

/**
 * How memory is captured. 0 stands for the default.
 */
typedef uint32_t lvp_protocol;

/**
 * How memory is compressed. 0 stands for the default.
 */
typedef uint32_t lvp_codec;

/**
 * Options of a checkpoint. Zero the struct, set struct_size, then what you care about.
 *
 * Since: 0.1
 */
typedef struct {
  /**
   * sizeof(lvp_checkpoint_options), as the caller was compiled.
   */
  size_t struct_size;
  /**
   * How to capture memory.
   */
  lvp_protocol protocol;
  /**
   * How to compress it.
   */
  lvp_codec codec;
  /**
   * Threads that copy and write memory; 0: one a core, 8 at most.
   */
  uint32_t threads;
  /**
   * Milliseconds between two harvests of dirty pages; 0: the default, 100.
   */
  uint32_t interval_ms;
  /**
   * Most bytes of memory for staged copies; 0: 10 % of the guest's, 64 MiB at least.
   */
  uint64_t max_staging_bytes;
  /**
   * Microseconds that the last copy in the pause should take at most; 0: the default.
   */
  uint64_t downtime_budget_us;
  /**
   * Not 0: do not wait until the image is on stable storage; a power cut may lose it.
   */
  uint32_t no_sync;
  /**
   * Must be 0.
   */
  uint32_t reserved;
  /**
   * Most bytes a second that are written to the image; 0: no limit. At least 1 MiB.
   */
  uint64_t max_bandwidth;
  /**
   * Longest acceptable downtime in microseconds; 0: any. The checkpoint is refused, or fails
   * with the machine running on, where it cannot be kept.
   */
  uint64_t max_downtime_us;
  /**
   * Milliseconds that the checkpoint may take; 0: any. It is refused where more are expected.
   */
  uint64_t deadline_ms;
  /**
   * Milliseconds without a sign of life after which a pause is ended, and the checkpoint fails;
   * from 10 to 60000; 0: 1000. A pause that makes progress is not ended by it.
   */
  uint32_t pause_limit_ms;
  /**
   * Level of LVP_CODEC_ZSTD, from 1 to 19; 0: 1. Must be 0 with other codecs.
   */
  uint32_t codec_level;
  /**
   * Path of a file in the image's directory that is given up and written over, which is faster
   * than new room; borrowed for the call. It is gone whatever comes of the checkpoint. NULL:
   * none.
   */
  const char *spare;
  /**
   * Not 0: the image has only what was written since the machine's last such image in the same
   * directory, where there is one, and needs the images before it. The guest's writes are tracked
   * from then on, which costs it a fault for each page that it writes between two images. Of
   * machines only: must be 0 in lvp_guest_checkpoint().
   */
  uint32_t incremental;
  /**
   * How many of the machine's images to keep in the directory; older ones are removed once the
   * new one is whole, as far as no kept one needs them. 0: all.
   */
  uint32_t keep;
} lvp_checkpoint_options;

/**
 * What has happened. A program must expect values that it does not know.
 */
typedef uint32_t lvp_event_kind;

/**
 * In which way a machine has ended. A program must expect values that it does not know.
 */
typedef uint32_t lvp_end_reason;

/**
 * Something that has happened to a machine. Set struct_size before lvp_events_next(). A later
 * version of the library may have more members than the header that a callback was compiled with.
 *
 * Since: 0.1
 */
typedef struct {
  /**
   * sizeof(lvp_event), as the caller was compiled.
   */
  size_t struct_size;
  /**
   * Counts what happened to the machine, from 1. A gap is what the reader was too slow for.
   */
  uint64_t number;
  /**
   * An LVP_EVENT_ value.
   */
  lvp_event_kind kind;
  /**
   * What the machine was doing from then on: an LVP_MACHINE_ value.
   */
  lvp_machine_state state;
  /**
   * LVP_EVENT_ENDED: an LVP_END_ value; else LVP_END_NONE.
   */
  lvp_end_reason reason;
  /**
   * LVP_EVENT_CHECKPOINT_ENDED: how, as lvp_job_wait() tells it; else LVP_OK.
   */
  lvp_status status;
  /**
   * Events of a checkpoint: lvp_job_number() of its job; else 0.
   */
  uint64_t job;
  /**
   * The reason or the error in English, ended by a zero byte; empty where there is none. Cut
   * where it is longer.
   */
  char text[LVP_EVENT_TEXT_SIZE];
} lvp_event;

/**
 * Called for each event, in their order, by one thread of the library's, which has every signal
 * blocked. `event` is the library's and valid during the call. May call every function, also
 * lvp_events_free() for these very events; must not unwind or longjmp() out.
 */
typedef void (*lvp_event_callback)(void *user_data, const lvp_event *event);

/**
 * How far a job is. Set struct_size before the call.
 *
 * Since: 0.1
 */
typedef struct {
  /**
   * sizeof(lvp_progress), as the caller was compiled.
   */
  size_t struct_size;
  /**
   * Bytes of guest memory that the scan has passed.
   */
  uint64_t scanned_bytes;
  /**
   * Bytes of guest memory in all.
   */
  uint64_t total_bytes;
  /**
   * Bytes written to the image so far.
   */
  uint64_t bytes_written;
  /**
   * Expected milliseconds to the end; UINT64_MAX where unknown.
   */
  uint64_t eta_ms;
} lvp_progress;

/**
 * What a checkpoint cost. Set struct_size before the call.
 *
 * Since: 0.1
 */
typedef struct {
  /**
   * sizeof(lvp_statistics), as the caller was compiled.
   */
  size_t struct_size;
  /**
   * Microseconds in which no vCPU ran, from the first kick to the last resume.
   */
  uint64_t downtime_us;
  /**
   * Microseconds from the start until the image was committed.
   */
  uint64_t total_us;
  /**
   * Size of the image in bytes.
   */
  uint64_t image_bytes;
  /**
   * Bytes of guest memory.
   */
  uint64_t memory_bytes;
  /**
   * Most bytes of memory that staged copies took.
   */
  uint64_t staging_peak_bytes;
  /**
   * Staged pages that had to be written early, since staging was full.
   */
  uint64_t spilled_pages;
  /**
   * Pages that were all zeros, and take no room.
   */
  uint64_t zero_pages;
} lvp_statistics;

/**
 * A range of guest memory in an image. Set struct_size before the call.
 *
 * Since: 0.1
 */
typedef struct {
  /**
   * sizeof(lvp_image_range), as the caller was compiled.
   */
  size_t struct_size;
  /**
   * Guest physical address of the first byte.
   */
  uint64_t gpa;
  /**
   * Length in bytes.
   */
  uint64_t bytes;
  /**
   * Number of the memory slot.
   */
  uint32_t slot;
  /**
   * 0.
   */
  uint32_t reserved;
} lvp_image_range;

/**
 * A section of state. Set struct_size before the call.
 *
 * Since: 0.1
 */
typedef struct {
  /**
   * sizeof(lvp_section), as the caller was compiled.
   */
  size_t struct_size;
  /**
   * What it describes, ended by a zero byte.
   */
  char kind[LVP_SECTION_KIND_SIZE];
  /**
   * Which one of its kind.
   */
  uint32_t instance;
  /**
   * Version of its layout.
   */
  uint32_t version;
  /**
   * Length in bytes.
   */
  uint64_t bytes;
  /**
   * The bytes: from a state, valid until the next call that changes that state or frees it.
   * NULL from an image.
   */
  const void *data;
} lvp_section;

/**
 * How a restore treats the guest's clocks.
 */
typedef uint32_t lvp_clock;

/**
 * What a guest is registered with. Zero the struct, set struct_size, then the rest.
 *
 * Since: 0.1
 */
typedef struct {
  /**
   * sizeof(lvp_guest_options), as the caller was compiled.
   */
  size_t struct_size;
  /**
   * Descriptor of the VM (KVM_CREATE_VM). Duplicated; the caller keeps its own.
   */
  int vm_fd;
  /**
   * Descriptor of /dev/kvm, above 0; duplicated. 0: the library opens it.
   */
  int kvm_fd;
  /**
   * How many vCPUs pass lvp_guest_vcpu_gate(): their numbers are below it. 0 where the pause
   * callback stops all vCPUs in its own way.
   */
  uint32_t vcpu_count;
  /**
   * Signal that kicks vCPUs out of KVM_RUN; 0: SIGRTMIN. Not used where callbacks->kick is set.
   * No handler is needed, none is called, and none is replaced.
   */
  int kick_signal;
  /**
   * The guest's name in its images; UTF-8, borrowed for the call. NULL: "guest".
   */
  const char *name;
  /**
   * The guest's UUID as text; borrowed for the call. NULL: a new one.
   */
  const char *uuid;
  /**
   * Text of the VMM's own, in every image: what it needs to make the same VM again. UTF-8, 1 MiB
   * at most, borrowed for the call. NULL: none.
   */
  const char *description;
} lvp_guest_options;

/**
 * What the engine asks of a VMM. Zero the struct, set struct_size, then what you have; NULL
 * stands for "nothing to do".
 *
 * Called from threads of the library's, which have every signal blocked; one at a time, but
 * host_dirty, which may be called beside any other. A callback that returns something other than
 * LVP_OK fails the checkpoint, and the number is in the error text. None may unwind or call
 * longjmp() out, call lvp_guest_free(), or wait for the job. All may take locks of their own, if
 * no vCPU or device thread holds one of those across lvp_guest_vcpu_gate().
 *
 * The order is: pause; the vCPUs stop at their gates; quiesce; save_state; the engine copies what
 * is left; resume; the vCPUs go on. A watchdog ends a pause in which nothing happens for a
 * second, and calls resume itself.
 *
 * Since: 0.1
 */
typedef struct {
  /**
   * sizeof(lvp_guest_callbacks), as the caller was compiled.
   */
  size_t struct_size;
  /**
   * Handed to every callback; not looked at.
   */
  void *user_data;
  /**
   * A pause begins. vCPUs that do not pass lvp_guest_vcpu_gate() stop before this returns.
   */
  lvp_status (*pause)(void *user_data);
  /**
   * Every vCPU has stopped. Devices finish what they have begun, within timeout_ms; after this
   * returns nothing of the VMM's writes guest memory or a backend until resume.
   */
  lvp_status (*quiesce)(void *user_data, uint32_t timeout_ms);
  /**
   * Adds the guest's state: lvp_kvm_state_save() and lvp_state_add(). `state` is the library's
   * and valid during the call.
   */
  lvp_status (*save_state)(void *user_data, lvp_state *state);
  /**
   * Ends a pause, once for each call of `pause` that returned LVP_OK, whatever came between.
   */
  void (*resume)(void *user_data);
  /**
   * Makes vCPU number `vcpu` leave KVM_RUN, or not enter it. If set, the library sends no
   * signal and changes no signal mask. May be called again until the vCPU is at its gate.
   */
  void (*kick)(void *user_data, uint32_t vcpu);
  /**
   * Takes the VMM's own log of the pages it wrote in memory slot `slot`: sets their bits (bit
   * n % 64 of word n / 64 for page n of the slot) in `bitmap`, which has `words` words and may
   * have bits set already, and forgets them. Instead of lvp_guest_mark_dirty(), or beside it.
   */
  void (*host_dirty)(void *user_data, uint32_t slot, uint64_t *bitmap, size_t words);
} lvp_guest_callbacks;

/**
 * A memory slot of the caller's VM. Zero the struct, set struct_size, then the rest.
 *
 * Since: 0.1
 */
typedef struct {
  /**
   * sizeof(lvp_guest_region), as the caller was compiled.
   */
  size_t struct_size;
  /**
   * Guest physical address of the first byte; a multiple of 4096.
   */
  uint64_t gpa;
  /**
   * Where this process has it mapped, readable and writable; a multiple of 4096.
   */
  void *hva;
  /**
   * Length in bytes; a multiple of 4096.
   */
  uint64_t bytes;
  /**
   * Number of the memory slot.
   */
  uint32_t slot;
  /**
   * Flags that the slot was set with; KVM_MEM_LOG_DIRTY_PAGES is refused.
   */
  uint32_t flags;
  /**
   * The file that is mapped there (memfd, hugetlbfs), above 0; borrowed for the call. 0: none.
   */
  int fd;
  /**
   * Must be 0.
   */
  uint32_t reserved;
} lvp_guest_region;

/**
 * Options of lvp_guest_fill(). Zero the struct, set struct_size, then what you care about.
 *
 * Since: 0.1
 */
typedef struct {
  /**
   * sizeof(lvp_fill_options), as the caller was compiled.
   */
  size_t struct_size;
  /**
   * Threads that read, check and copy; 0: one a core, 8 at most.
   */
  uint32_t threads;
  /**
   * Not 0: all of the memory is still zeros, as after mapping it: zeros are not written then,
   * and take no memory of the host's.
   */
  uint32_t memory_is_fresh;
} lvp_fill_options;

/**
 * What a vCPU's thread does next; negative values are LVP_E_ statuses.
 */
typedef int32_t lvp_gate;

/**
 * Gives memory back to the host; returns what lvp_guest_discard() returns.
 */
typedef lvp_status (*lvp_discard_callback)(void *user_data);

/**
 * Done.
 */
#define LVP_OK 0

/**
 * An argument is NULL or malformed.
 */
#define LVP_E_INVALID -10

/**
 * Not supported (yet).
 */
#define LVP_E_UNSUPPORTED -11

/**
 * There is no such thing.
 */
#define LVP_E_NOT_FOUND -12

/**
 * The machine's state does not allow it.
 */
#define LVP_E_STATE -20

/**
 * Somebody else uses the machine, image or file.
 */
#define LVP_E_BUSY -21

/**
 * A callback of the caller's failed; the text has what it returned.
 */
#define LVP_E_CALLBACK -22

/**
 * This host lacks a device, a kernel feature or a permission.
 */
#define LVP_E_HOST -30

/**
 * A system call on a file failed.
 */
#define LVP_E_IO -31

/**
 * An image is damaged, or not an image.
 */
#define LVP_E_CORRUPT -40

/**
 * An image needs what this host lacks.
 */
#define LVP_E_INCOMPATIBLE -41

/**
 * The job was cancelled.
 */
#define LVP_E_CANCELLED -50

/**
 * Not done in time.
 */
#define LVP_E_TIMEOUT -51

/**
 * A bug in livepoint.
 */
#define LVP_E_INTERNAL -90

/**
 * Nothing at all.
 */
#define LVP_LOG_NONE 0

/**
 * Something failed that no call could report.
 */
#define LVP_LOG_ERROR 1

/**
 * Something is not as it should be.
 */
#define LVP_LOG_WARNING 2

/**
 * Something that a user may want to know.
 */
#define LVP_LOG_INFO 3

/**
 * What helps to find a bug.
 */
#define LVP_LOG_DEBUG 4

/**
 * The default: LVP_PROTOCOL_THREADED.
 */
#define LVP_PROTOCOL_DEFAULT 0

/**
 * Pause, write everything, resume: the traditional way.
 */
#define LVP_PROTOCOL_STOP 1

/**
 * Copy while the guest runs; pause only for the last dirty pages.
 */
#define LVP_PROTOCOL_THREADED 2

/**
 * Copy in rounds until the rest fits the downtime: live migration to a file.
 */
#define LVP_PROTOCOL_PRECOPY 4

/**
 * LVP_PROTOCOL_THREADED or LVP_PROTOCOL_COW, whichever is expected to cost the guest less.
 */
#define LVP_PROTOCOL_AUTO 5

/**
 * Pause to write-protect memory; copy each part of it before its first write.
 */
#define LVP_PROTOCOL_COW 3

/**
 * The default: LVP_CODEC_LZ4.
 */
#define LVP_CODEC_DEFAULT 0

/**
 * Not at all.
 */
#define LVP_CODEC_NONE 1

/**
 * By lz4: fast.
 */
#define LVP_CODEC_LZ4 2

/**
 * By zstd at level 1: smaller.
 */
#define LVP_CODEC_ZSTD 3

/**
 * Defined, and never started.
 */
#define LVP_MACHINE_CREATED 1

/**
 * Its vCPUs run.
 */
#define LVP_MACHINE_RUNNING 2

/**
 * Its vCPUs are held by lvp_machine_pause().
 */
#define LVP_MACHINE_PAUSED 3

/**
 * It has ended: by itself, or by lvp_machine_destroy().
 */
#define LVP_MACHINE_SHUTOFF 4

/**
 * It has ended by a fault of the guest that nothing handled.
 */
#define LVP_MACHINE_CRASHED 5

/**
 * The machine was started; its state tells whether it waits for lvp_machine_resume().
 */
#define LVP_EVENT_STARTED 1

/**
 * lvp_machine_pause() has stopped it. A checkpoint's own pause is no event.
 */
#define LVP_EVENT_PAUSED 2

/**
 * lvp_machine_resume() lets it go on.
 */
#define LVP_EVENT_RESUMED 3

/**
 * It starts over: by lvp_machine_reset(), or because the guest asked for it.
 */
#define LVP_EVENT_RESET 4

/**
 * It has ended; `reason` says in which way.
 */
#define LVP_EVENT_ENDED 5

/**
 * A checkpoint has begun; `job` is its number.
 */
#define LVP_EVENT_CHECKPOINT_STARTED 6

/**
 * A checkpoint has ended; `status` is LVP_OK where its image is whole.
 */
#define LVP_EVENT_CHECKPOINT_ENDED 7

/**
 * It was put back to an image.
 */
#define LVP_EVENT_REWOUND 8

/**
 * It has not.
 */
#define LVP_END_NONE 0

/**
 * The guest powered off.
 */
#define LVP_END_POWERED_OFF 1

/**
 * The guest reset itself, and its domain XML has it end then.
 */
#define LVP_END_RESET 2

/**
 * lvp_machine_destroy() or lvp_machine_free() ended it.
 */
#define LVP_END_DESTROYED 3

/**
 * The guest crashed.
 */
#define LVP_END_CRASHED 4

/**
 * The machine itself could not go on.
 */
#define LVP_END_FAILED 5

/**
 * They go on where they stopped.
 */
#define LVP_CLOCK_CONTINUE 0

/**
 * They are moved on by the time that has passed since.
 */
#define LVP_CLOCK_REALTIME 1

/**
 * Call KVM_RUN.
 */
#define LVP_GATE_ENTER 0

/**
 * kvm_run has an exit: handle it as after KVM_RUN, then call the gate again.
 */
#define LVP_GATE_HANDLE_EXIT 1

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

/**
 * Returns the version of the library that is running, as LVP_VERSION_NUMBER encodes it:
 * `major << 16 | minor << 8 | patch`.
 *
 * Compare with LVP_VERSION_NUMBER to tell the header from the library. Does not block or fail.
 * Thread-safe.
 *
 * Since: 0.1
 */
uint32_t lvp_version(void);

/**
 * Returns the version of the library that is running, as text such as "0.1.0".
 *
 * Static; do not free. Does not block or fail. Thread-safe.
 *
 * Since: 0.1
 */
const char *lvp_version_string(void);

/**
 * Returns the text of the last error on this thread, in English, on one line.
 *
 * Owned by the library; valid until the next `lvp_` call on this thread. Empty when none has
 * failed. Never NULL. A call that succeeds leaves it as it was. Does not block. Thread-safe:
 * every thread has its own.
 *
 * Since: 0.1
 */
const char *lvp_error_message(void);

/**
 * Says where the library's messages go. Without this call they go nowhere.
 *
 * This is the one setting that the whole process shares, not a handle: some messages belong to no
 * handle. It is this library's alone: no other library's logger is touched.
 *
 * @param callback   receives the messages; NULL: they go nowhere again
 * @param user_data  handed to the callback; not looked at
 * @param level      the least important ones that are wanted: an LVP_LOG_ value
 *
 * Returns LVP_OK, and the callback that was set before is called no more; LVP_E_INVALID;
 * LVP_E_STATE (called from the callback, or the library is part of a Rust program that has a
 * logger). Blocks while calls of the former callback are under way. Thread-safe.
 *
 * Since: 0.1
 */
lvp_status lvp_log_set(lvp_log_callback callback, void *user_data, lvp_log_level level);

/**
 * Checks domain XML without a machine, and returns it in its canonical form: what
 * lvp_machine_new() would make of it, with every default.
 *
 * @param xml            zero-terminated UTF-8, borrowed for the call
 * @param canonical_out  receives the canonical form; release it with lvp_string_free(). May be
 *                       NULL.
 * @param place_out      receives the place of the error where the XML is refused, and only then:
 *                       set place_out->struct_size first. May be NULL.
 *
 * Returns LVP_OK; LVP_E_INVALID (NULL, or the XML is malformed), LVP_E_UNSUPPORTED (it asks for
 * what no machine of this library has); the message names line and element. Opens no file. Does
 * not block. Thread-safe.
 *
 * Since: 0.1
 */
lvp_status lvp_domain_check(const char *xml, char **canonical_out, lvp_xml_place *place_out);

/**
 * Asks whether this host can run machines: /dev/kvm with all that they need.
 *
 * Returns LVP_OK; LVP_E_HOST (the message says what is missing, and what may help). Makes and
 * drops an empty VM. Thread-safe.
 *
 * Since: 0.1
 */
lvp_status lvp_host_check(void);

/**
 * Makes a machine from libvirt domain XML. Nothing runs yet.
 *
 * @param xml          zero-terminated UTF-8, borrowed for the call; docs/domain-xml.md says what
 *                     is honoured
 * @param options      NULL for the defaults
 * @param machine_out  receives the machine; release it with lvp_machine_free()
 *
 * Returns LVP_OK; LVP_E_INVALID (NULL, or the XML is refused: the message names line and
 * element), LVP_E_UNSUPPORTED, LVP_E_IO (the runtime directory). Does not block on I/O but for
 * that directory. Thread-safe.
 *
 * Since: 0.1
 */
lvp_status lvp_machine_new(const char *xml,
                           const lvp_machine_options *options,
                           lvp_machine **machine_out);

/**
 * Makes a machine from an image, with its memory filled and every digest checked. It does not
 * run until lvp_machine_start().
 *
 * @param image        path of an image file, or of a directory: then its newest image
 * @param options      NULL for the defaults
 * @param machine_out  receives the machine; release it with lvp_machine_free()
 *
 * Returns LVP_OK; LVP_E_INVALID, LVP_E_NOT_FOUND (no such image), LVP_E_CORRUPT,
 * LVP_E_INCOMPATIBLE (the message lists what this host lacks), LVP_E_BUSY (the machine runs
 * already; the message names the holder), LVP_E_HOST (/dev/kvm), LVP_E_IO. Blocks while the
 * image is read. Thread-safe.
 *
 * Since: 0.1
 */
lvp_status lvp_machine_restore(const char *image,
                               const lvp_machine_options *options,
                               lvp_machine **machine_out);

/**
 * Builds the machine and lets its vCPUs run. After lvp_machine_restore() they go on where the
 * image has them. A machine that has ended may be started again, from the beginning.
 *
 * Returns LVP_OK; LVP_E_STATE (it runs), LVP_E_BUSY (another process runs it: the message names
 * it), LVP_E_HOST (/dev/kvm or memory), LVP_E_INVALID or LVP_E_IO (the kernel file). Blocks
 * while memory is allocated and the kernel read. Thread-safe.
 *
 * Since: 0.1
 */
lvp_status lvp_machine_start(lvp_machine *machine);

/**
 * Stops the vCPUs until lvp_machine_resume(). On return none runs. Checkpoints work meanwhile.
 *
 * Returns LVP_OK; LVP_E_INVALID, LVP_E_STATE (it does not run, or is paused), LVP_E_TIMEOUT.
 * Blocks until the vCPUs have stopped: well under a millisecond, most often. Thread-safe.
 *
 * Since: 0.1
 */
lvp_status lvp_machine_pause(lvp_machine *machine);

/**
 * Undoes lvp_machine_pause().
 *
 * Returns LVP_OK; LVP_E_INVALID, LVP_E_STATE (it is not paused). Does not block. Thread-safe.
 *
 * Since: 0.1
 */
lvp_status lvp_machine_resume(lvp_machine *machine);

/**
 * Presses the machine's power button: a guest that listens shuts down, any other runs on.
 *
 * Returns LVP_OK; LVP_E_INVALID, LVP_E_STATE (it does not run). Does not block. Thread-safe.
 *
 * Since: 0.1
 */
lvp_status lvp_machine_shutdown(lvp_machine *machine);

/**
 * Ends the machine at once, as pulling its plug would. A checkpoint that runs fails.
 *
 * Returns LVP_OK; LVP_E_INVALID, LVP_E_STATE (it does not run). Blocks until the vCPU threads
 * have ended. Thread-safe.
 *
 * Since: 0.1
 */
lvp_status lvp_machine_destroy(lvp_machine *machine);

/**
 * Tells what the machine is doing.
 *
 * @param state_out  receives an LVP_MACHINE_ value
 *
 * Returns LVP_OK; LVP_E_INVALID. Does not block. Thread-safe.
 *
 * Since: 0.1
 */
lvp_status lvp_machine_get_state(const lvp_machine *machine, lvp_machine_state *state_out);

/**
 * Waits until the machine has ended.
 *
 * @param timeout_ms  most milliseconds to wait; negative: for ever
 * @param state_out   receives LVP_MACHINE_SHUTOFF or LVP_MACHINE_CRASHED; may be NULL
 *
 * Returns LVP_OK; LVP_E_INVALID, LVP_E_STATE (it was never started), LVP_E_TIMEOUT.
 * Thread-safe.
 *
 * Since: 0.1
 */
lvp_status lvp_machine_wait(const lvp_machine *machine,
                            int64_t timeout_ms,
                            lvp_machine_state *state_out);

/**
 * Starts a checkpoint; the machine runs on (LVP_PROTOCOL_STOP: is paused for a while).
 *
 * @param machine  running or paused
 * @param out      path of the image file to write, or of an existing directory to add an image
 *                 to; borrowed for the call. An image that is there stays whole until the new
 *                 one is complete.
 * @param options  NULL for the defaults
 * @param job_out  receives the job; release it with lvp_job_free()
 *
 * Returns LVP_OK; LVP_E_INVALID, LVP_E_STATE (it does not run), LVP_E_BUSY (a checkpoint of it
 * runs already), LVP_E_IO. What goes wrong later is told by lvp_job_wait(). Does not block while
 * memory is copied. Thread-safe.
 *
 * Since: 0.1
 */
lvp_status lvp_machine_checkpoint(lvp_machine *machine,
                                  const char *out,
                                  const lvp_checkpoint_options *options,
                                  lvp_job **job_out);

/**
 * Releases a machine; one that runs is destroyed first. NULL is ignored.
 *
 * Jobs of it stay valid; a checkpoint that still runs fails. Blocks until the vCPU threads have
 * ended. No other call on this handle may run or follow.
 *
 * Since: 0.1
 */
void lvp_machine_free(lvp_machine *machine);

/**
 * Resets the machine, as its reset button would: it starts from the beginning.
 *
 * Returns LVP_OK; LVP_E_INVALID, LVP_E_STATE (it does not run). Blocks until the vCPUs have
 * stopped and the kernel is read again. Thread-safe.
 *
 * Since: 0.1
 */
lvp_status lvp_machine_reset(lvp_machine *machine);

/**
 * Returns the machine's domain XML; while it runs, with its id and the paths of its consoles.
 *
 * @param xml_out  receives the text; release it with lvp_string_free()
 *
 * Returns LVP_OK; LVP_E_INVALID. Does not block. Thread-safe.
 *
 * Since: 0.1
 */
lvp_status lvp_machine_xml(const lvp_machine *machine, char **xml_out);

/**
 * Describes the machine in figures, as JSON: name, UUID, state, vCPUs, memory, consoles and the
 * checkpoint that runs, as `livepoint list --json` does. A console's path can be opened to read
 * and write what the guest's serial port does.
 *
 * @param json_out  receives the text; release it with lvp_string_free()
 *
 * Returns LVP_OK; LVP_E_INVALID. Does not block. Thread-safe.
 *
 * Since: 0.1
 */
lvp_status lvp_machine_inspect(const lvp_machine *machine, char **json_out);

/**
 * Opens a serial console of a machine that runs, for reading and writing: its terminal
 * (`<serial type='pty'>`), or a connection to its socket (`<serial type='unix'>`).
 *
 * What the guest wrote while nobody had the console open is gone; console_fds of
 * lvp_machine_options miss nothing.
 *
 * @param number  of the serial port, from 0
 * @param fd_out  receives a descriptor, blocking and with FD_CLOEXEC set, which the caller closes
 *
 * Returns LVP_OK; LVP_E_INVALID, LVP_E_STATE (it was never started), LVP_E_NOT_FOUND (no such
 * console, or the machine has ended), LVP_E_UNSUPPORTED (it goes elsewhere), LVP_E_IO. Does not
 * block. Thread-safe.
 *
 * Since: 0.1
 */
lvp_status lvp_machine_console(lvp_machine *machine, uint32_t number, int *fd_out);

/**
 * Puts a machine back to an image of it, in place: the same process, VM and memory, of which what
 * has not changed since is kept where the guest's writes are tracked (`incremental` and `track` of
 * the options). A machine that is paused stays paused. The guest is told by a new generation id.
 *
 * @param machine  running or paused
 * @param image    path of an image file, or of a directory: then its newest image. NULL: the last
 *                 incremental checkpoint of the machine. Borrowed for the call.
 *
 * Returns LVP_OK; LVP_E_INVALID (of another domain, or there is no last checkpoint), LVP_E_NOT_FOUND,
 * LVP_E_CORRUPT, LVP_E_INCOMPATIBLE, LVP_E_UNSUPPORTED (the guest writes to a disk), LVP_E_STATE (it
 * does not run), LVP_E_BUSY (a checkpoint of it runs), LVP_E_IO. After each of these the machine is
 * as it was; where memory fails to be written after that, it ends. Blocks until the machine goes on.
 * Thread-safe.
 *
 * Since: 0.1
 */
lvp_status lvp_machine_rewind(lvp_machine *machine,
                              const char *image);

/**
 * Reads the memory of an image once, checks every byte of it, and keeps it for machines that start
 * from that image (`shared_memory` of lvp_machine_options) and share its pages until they write
 * them. Nobody can change it, in this process or another.
 *
 * @param image       path of an image file, or of a directory: then its newest image
 * @param memory_out  receives the memory; release it with lvp_shared_memory_free()
 *
 * Returns LVP_OK; LVP_E_INVALID, LVP_E_NOT_FOUND, LVP_E_CORRUPT, LVP_E_UNSUPPORTED (memory that is
 * locked or in hugetlb pages), LVP_E_HOST, LVP_E_IO. Blocks while the image is read. Thread-safe.
 *
 * Since: 0.1
 */
lvp_status lvp_shared_memory_load(const char *image, lvp_shared_memory **memory_out);

/**
 * Releases shared memory; machines that use it keep it. NULL is ignored. Does not block.
 *
 * Since: 0.1
 */
void lvp_shared_memory_free(lvp_shared_memory *memory);

/**
 * Writes an image that holds the same as another and needs no other one.
 *
 * @param image        path of an image file, or of a directory: then its newest image
 * @param out          path of the image file to write, or of a directory to add the image to
 * @param out_codec    an LVP_CODEC_ value
 * @param codec_level  level of LVP_CODEC_ZSTD, from 1 to 19, or 0; 0 with other codecs
 *
 * Returns LVP_OK; LVP_E_INVALID, LVP_E_NOT_FOUND, LVP_E_CORRUPT, LVP_E_BUSY (what is at `out` is in
 * use or needed by another image), LVP_E_IO. Blocks while it is written. Thread-safe.
 *
 * Since: 0.1
 */
lvp_status lvp_image_rebase(const char *image,
                            const char *out,
                            lvp_codec out_codec,
                            uint32_t codec_level);

/**
 * Removes images from a directory that are older than the newest `keep` of their domain, as far as
 * no kept one needs them and nobody reads them.
 *
 * @param directory    directory of images
 * @param keep         how many images of each domain to keep, at least 1
 * @param removed_out  receives how many were removed; may be NULL
 *
 * Returns LVP_OK; LVP_E_INVALID, LVP_E_NOT_FOUND, LVP_E_IO. Blocks while files are removed.
 * Thread-safe.
 *
 * Since: 0.1
 */
lvp_status lvp_images_collect(const char *directory, uint32_t keep, uint64_t *removed_out);

/**
 * Watches a machine: its starts, pauses, resets and end, also over restarts, and its checkpoints.
 *
 * @param callback    called for each event; or NULL: take events by lvp_events_next() then, and
 *                    poll lvp_events_fd()
 * @param user_data   handed to the callback; not looked at
 * @param events_out  receives the events; release them with lvp_events_free()
 *
 * Events that are not taken are kept, 1024 at most: then the oldest is lost.
 *
 * Returns LVP_OK; LVP_E_INVALID; LVP_E_HOST (no descriptor or no thread is to be had). Does not
 * block. Thread-safe.
 *
 * Since: 0.1
 */
lvp_status lvp_machine_events(lvp_machine *machine,
                              lvp_event_callback callback,
                              void *user_data,
                              lvp_events **events_out);

/**
 * Returns a descriptor that is readable while an event waits, and when none will come any more,
 * for poll(2) and the like.
 *
 * Owned by the events: do not read, write or close it; it is closed by lvp_events_free(). Returns
 * -1 when `events` is NULL, or has a callback. Does not block. Thread-safe.
 *
 * Since: 0.1
 */
int lvp_events_fd(const lvp_events *events);

/**
 * Takes the next event.
 *
 * @param timeout_ms  most milliseconds to wait for one; 0: only look; negative: for ever
 * @param event_out   receives the event; set event_out->struct_size first
 *
 * Returns LVP_OK; LVP_E_TIMEOUT (none came); LVP_E_NOT_FOUND (none will come: the machine was
 * freed); LVP_E_STATE (the events go to a callback); LVP_E_INVALID. Each event is taken once, also
 * where several threads ask. Thread-safe.
 *
 * Since: 0.1
 */
lvp_status lvp_events_next(lvp_events *events, int64_t timeout_ms, lvp_event *event_out);

/**
 * Releases events. NULL is ignored. On return the callback is called no more: blocks while a call
 * of it is under way, unless this is called from the callback itself. No other call on this
 * handle may run or follow. The machine may have been freed before.
 *
 * Since: 0.1
 */
void lvp_events_free(lvp_events *events);

/**
 * Returns a descriptor that becomes readable when the job has ended, for poll(2) and the like.
 *
 * Owned by the job: do not read, write or close it; it is closed by lvp_job_free(). Returns -1
 * when `job` is NULL. Does not block. Thread-safe.
 *
 * Since: 0.1
 */
int lvp_job_fd(const lvp_job *job);

/**
 * Returns the job's number among those of its machine or guest, from 1: the one that events have.
 * Returns 0 when `job` is NULL. Does not block. Thread-safe.
 *
 * Since: 0.1
 */
uint64_t lvp_job_number(const lvp_job *job);

/**
 * Waits until the job has ended and tells how.
 *
 * @param timeout_ms  most milliseconds to wait; 0: only look; negative: for ever
 *
 * Returns LVP_OK once the image is complete; LVP_E_TIMEOUT while the job runs; else the job's
 * own error: LVP_E_CANCELLED, LVP_E_IO, LVP_E_STATE (the machine ended) and others, with text
 * from lvp_job_error(). After an error there is no image, an older one at the same path is
 * whole, and the machine runs on. May be called again, and from several threads. Thread-safe.
 *
 * Since: 0.1
 */
lvp_status lvp_job_wait(const lvp_job *job, int64_t timeout_ms);

/**
 * Asks the job to end. It ends within 100 ms, unless it is complete by then; lvp_job_wait()
 * tells which. A job that has ended stays as it is.
 *
 * Returns LVP_OK; LVP_E_INVALID. Does not block. Thread-safe.
 *
 * Since: 0.1
 */
lvp_status lvp_job_cancel(lvp_job *job);

/**
 * Tells how far the job is.
 *
 * @param progress_out  set progress_out->struct_size first
 *
 * Returns LVP_OK; LVP_E_INVALID. Does not block. Thread-safe.
 *
 * Since: 0.1
 */
lvp_status lvp_job_progress(const lvp_job *job, lvp_progress *progress_out);

/**
 * Tells what a checkpoint cost, once it is complete.
 *
 * @param statistics_out  set statistics_out->struct_size first
 *
 * Returns LVP_OK; LVP_E_INVALID; LVP_E_TIMEOUT while the job runs; the job's own error if it
 * failed. Does not block. Thread-safe.
 *
 * Since: 0.1
 */
lvp_status lvp_job_statistics(const lvp_job *job, lvp_statistics *statistics_out);

/**
 * Returns the path of the image, once the job is complete.
 *
 * @param path_out  receives the path; owned by the job, valid until lvp_job_free()
 *
 * Returns LVP_OK; LVP_E_INVALID; LVP_E_TIMEOUT while the job runs; the job's own error if it
 * failed. Does not block. Thread-safe.
 *
 * Since: 0.1
 */
lvp_status lvp_job_image(const lvp_job *job, const char **path_out);

/**
 * Returns everything that was measured of a checkpoint, once it is complete, as JSON: what
 * `livepoint checkpoint --json` prints, with the protocol that was taken and why, the parts of the
 * downtime, and by how much a promise was missed.
 *
 * @param json_out  receives the text; release it with lvp_string_free()
 *
 * Returns LVP_OK; LVP_E_INVALID; LVP_E_TIMEOUT while the job runs; the job's own error if it
 * failed. Does not block. Thread-safe.
 *
 * Since: 0.1
 */
lvp_status lvp_job_inspect(const lvp_job *job, char **json_out);

/**
 * Returns why the job failed, in English, on one line.
 *
 * Owned by the job; valid until lvp_job_free(). Empty while the job runs and when it succeeded;
 * never NULL unless `job` is. Does not block. Thread-safe.
 *
 * Since: 0.1
 */
const char *lvp_job_error(const lvp_job *job);

/**
 * Releases a job. NULL is ignored. A checkpoint that still runs goes on to its end.
 *
 * Does not block. No other call on this handle may run or follow.
 *
 * Since: 0.1
 */
void lvp_job_free(lvp_job *job);

/**
 * Opens an image. Checks its header, manifest, chunk table and page index; guest memory and state
 * are checked as they are read.
 *
 * @param path       of an image file, or of a directory: then its newest image; borrowed for the
 *                   call
 * @param image_out  receives the image; release it with lvp_image_free()
 *
 * Returns LVP_OK; LVP_E_INVALID, LVP_E_NOT_FOUND, LVP_E_CORRUPT, LVP_E_BUSY (it is being
 * replaced), LVP_E_IO. Blocks while tables are read. Thread-safe.
 *
 * Since: 0.1
 */
lvp_status lvp_image_open(const char *path, lvp_image **image_out);

/**
 * Releases text that the library gave away. NULL is ignored. Does not block. Thread-safe.
 *
 * Since: 0.1
 */
void lvp_string_free(char *text);

/**
 * Describes an image in figures, as JSON: what `livepoint inspect --json` prints.
 *
 * @param json_out  receives the text; release it with lvp_string_free()
 *
 * Returns LVP_OK; LVP_E_INVALID. Does not block. Thread-safe.
 *
 * Since: 0.1
 */
lvp_status lvp_image_inspect(const lvp_image *image, char **json_out);

/**
 * Returns what the VMM said of the guest when it was saved: the description that it gave to
 * lvp_guest_new(), or for a machine of this library its domain XML.
 *
 * @param text_out  receives the text; release it with lvp_string_free()
 *
 * Returns LVP_OK; LVP_E_INVALID. Does not block. Thread-safe.
 *
 * Since: 0.1
 */
lvp_status lvp_image_description(const lvp_image *image, char **text_out);

/**
 * Reads every byte that a restore would use, and checks every digest.
 *
 * Returns LVP_OK where the image is whole; LVP_E_CORRUPT (the message names the first damage);
 * LVP_E_INVALID, LVP_E_IO. Blocks while the image is read. Thread-safe.
 *
 * Since: 0.1
 */
lvp_status lvp_image_verify(const lvp_image *image);

/**
 * Asks whether this host can restore an image.
 *
 * Returns LVP_OK; LVP_E_INCOMPATIBLE (the message lists what the host lacks); LVP_E_HOST
 * (/dev/kvm cannot be used); LVP_E_INVALID. Makes and drops an empty VM. Thread-safe.
 *
 * Since: 0.1
 */
lvp_status lvp_image_check_host(const lvp_image *image);

/**
 * Returns how many ranges of guest memory an image has; 0 where `image` is NULL. Does not block.
 * Thread-safe.
 *
 * Since: 0.1
 */
size_t lvp_image_range_count(const lvp_image *image);

/**
 * Tells of one range of guest memory. Ranges are sorted and do not overlap.
 *
 * @param index      from 0 to lvp_image_range_count() - 1
 * @param range_out  set range_out->struct_size first
 *
 * Returns LVP_OK; LVP_E_NOT_FOUND; LVP_E_INVALID. Does not block. Thread-safe.
 *
 * Since: 0.1
 */
lvp_status lvp_image_get_range(const lvp_image *image, size_t index, lvp_image_range *range_out);

/**
 * Reads guest memory as it was at the captured moment, with its digests checked.
 *
 * @param gpa     guest physical address of the first byte
 * @param buffer  receives the bytes; has `bytes` of room. Its content is not told after an error.
 * @param bytes   how many; all of them must be in the image
 *
 * Returns LVP_OK; LVP_E_NOT_FOUND (the image has no memory at some address of the range);
 * LVP_E_INVALID, LVP_E_CORRUPT, LVP_E_IO. Blocks while chunks of 2 MiB are read: a large range at
 * once costs less than many small ones. Thread-safe.
 *
 * Since: 0.1
 */
lvp_status lvp_image_read(const lvp_image *image, uint64_t gpa, void *buffer, size_t bytes);

/**
 * Writes guest memory to a flat file: the byte at offset n is that at guest physical address n.
 * Zeros and what is between ranges become holes.
 *
 * @param path  of the file; made, or emptied; borrowed for the call. Not an image.
 *
 * Returns LVP_OK; LVP_E_INVALID, LVP_E_CORRUPT, LVP_E_IO. After an error the file is partly
 * written. Blocks while all of it is read and written. Thread-safe.
 *
 * Since: 0.1
 */
lvp_status lvp_image_export(const lvp_image *image, const char *path);

/**
 * Returns how many state sections an image has; 0 where `image` is NULL. Does not block.
 * Thread-safe.
 *
 * Since: 0.1
 */
size_t lvp_image_section_count(const lvp_image *image);

/**
 * Tells of one state section, without reading it.
 *
 * @param index        from 0 to lvp_image_section_count() - 1
 * @param section_out  set section_out->struct_size first; its data becomes NULL
 *
 * Returns LVP_OK; LVP_E_NOT_FOUND; LVP_E_INVALID. Does not block. Thread-safe.
 *
 * Since: 0.1
 */
lvp_status lvp_image_section(const lvp_image *image, size_t index, lvp_section *section_out);

/**
 * Reads the guest's state, with every digest checked.
 *
 * @param state_out  receives the state; release it with lvp_state_free()
 *
 * Returns LVP_OK; LVP_E_INVALID, LVP_E_CORRUPT, LVP_E_IO. Blocks while it is read. Thread-safe.
 *
 * Since: 0.1
 */
lvp_status lvp_image_state(const lvp_image *image, lvp_state **state_out);

/**
 * Closes an image. NULL is ignored. Does not block.
 *
 * Since: 0.1
 */
void lvp_image_free(lvp_image *image);

/**
 * Makes an empty state.
 *
 * @param state_out  receives the state; release it with lvp_state_free()
 *
 * Returns LVP_OK; LVP_E_INVALID. Does not block. Thread-safe.
 *
 * Since: 0.1
 */
lvp_status lvp_state_new(lvp_state **state_out);

/**
 * Adds a section of the VMM's own.
 *
 * @param kind      what it describes: from 1 to 64 bytes of UTF-8 but for "vcpu", "irqchip",
 *                  "pit" and "clock", which lvp_kvm_state_save() adds; borrowed for the call
 * @param instance  which one of its kind
 * @param version   version of the data's layout; from 0 to 65535
 * @param data      the state; copied. NULL where `bytes` is 0.
 * @param bytes     its length; 16 MiB at most
 *
 * Returns LVP_OK; LVP_E_INVALID (also: this kind and instance is there already). Does not block.
 * Calls that change one state must not overlap with others on it that use its data.
 *
 * Since: 0.1
 */
lvp_status lvp_state_add(lvp_state *state,
                         const char *kind,
                         uint32_t instance,
                         uint32_t version,
                         const void *data,
                         size_t bytes);

/**
 * Finds a section by its name and number.
 *
 * @param section_out  set section_out->struct_size first
 *
 * Returns LVP_OK; LVP_E_NOT_FOUND; LVP_E_INVALID. Does not block. Thread-safe.
 *
 * Since: 0.1
 */
lvp_status lvp_state_find(const lvp_state *state,
                          const char *kind,
                          uint32_t instance,
                          lvp_section *section_out);

/**
 * Returns how many sections a state has; 0 where `state` is NULL. Does not block. Thread-safe.
 *
 * Since: 0.1
 */
size_t lvp_state_section_count(const lvp_state *state);

/**
 * Tells of one section.
 *
 * @param index        from 0 to lvp_state_section_count() - 1
 * @param section_out  set section_out->struct_size first
 *
 * Returns LVP_OK; LVP_E_NOT_FOUND; LVP_E_INVALID. Does not block. Thread-safe.
 *
 * Since: 0.1
 */
lvp_status lvp_state_section(const lvp_state *state, size_t index, lvp_section *section_out);

/**
 * Releases a state. NULL is ignored. Not for one that a callback was lent. Does not block.
 *
 * Since: 0.1
 */
void lvp_state_free(lvp_state *state);

/**
 * Adds what KVM keeps of a VM: vCPUs with MSRs and local APICs, interrupt controllers and timer
 * where KVM has them, and the clock; read in the order that loses nothing.
 *
 * For any VM on KVM. No vCPU may run, and no exit may be pending: in a save_state callback that
 * is so for vCPUs that stopped at their gates.
 *
 * @param vm_fd       the VM's descriptor; stays the caller's
 * @param vcpu_fds    the descriptors of all vCPUs, in their order
 * @param vcpu_count  how many; at least 1
 *
 * Returns LVP_OK; LVP_E_INVALID; LVP_E_HOST (a descriptor is not KVM's, or /dev/kvm cannot be
 * opened: a state that a callback was lent does not open it); LVP_E_INCOMPATIBLE (KVM refused;
 * the guest may run guests of its own). On an error nothing was added. Blocks while vCPUs are in
 * the kernel.
 *
 * Since: 0.1
 */
lvp_status lvp_kvm_state_save(lvp_state *state, int vm_fd, const int *vcpu_fds, size_t vcpu_count);

/**
 * Sets what lvp_kvm_state_save() saved, in the order that KVM needs, in a VM that the caller made
 * with as many vCPUs, the same chips in KVM, and its memory registered and filled.
 *
 * Interrupt controllers come before vCPUs (KVM refuses it otherwise); the vCPUs have never run.
 * Their CPUID is set here too. May write guest memory.
 *
 * @param clock  LVP_CLOCK_CONTINUE or LVP_CLOCK_REALTIME
 *
 * Returns LVP_OK, and the sections are gone from `state`: what is left is the VMM's own;
 * LVP_E_INVALID; LVP_E_NOT_FOUND (a vCPU has no section); LVP_E_HOST; LVP_E_INCOMPATIBLE (KVM
 * refuses the state; the VM is half-set and must not run); LVP_E_CORRUPT.
 *
 * Since: 0.1
 */
lvp_status lvp_kvm_state_restore(lvp_state *state,
                                 int vm_fd,
                                 const int *vcpu_fds,
                                 size_t vcpu_count,
                                 lvp_clock clock);

/**
 * Registers a VM that the caller made on KVM and runs itself.
 *
 * The dirty logs of the registered memory slots, and userfaultfd on their memory, belong to the
 * library while a checkpoint runs. Nothing of the VM is changed otherwise.
 *
 * @param options    borrowed for the call
 * @param callbacks  copied; the functions and user_data stay valid until lvp_guest_free() returns
 * @param guest_out  receives the guest; release it with lvp_guest_free()
 *
 * Returns LVP_OK; LVP_E_INVALID; LVP_E_HOST (vm_fd or kvm_fd is not KVM's, or /dev/kvm cannot be
 * opened). Does not block. Thread-safe.
 *
 * Since: 0.1
 */
lvp_status lvp_guest_new(const lvp_guest_options *options,
                         const lvp_guest_callbacks *callbacks,
                         lvp_guest **guest_out);

/**
 * Registers a memory slot that the VM has, at first or later (hotplug).
 *
 * The memory stays mapped where it is, by this one writable mapping, until
 * lvp_guest_remove_region() or lvp_guest_free() returns. No other process writes it (vhost-user,
 * VFIO): such a guest cannot be checkpointed.
 *
 * @param region  borrowed for the call
 *
 * Returns LVP_OK; LVP_E_INVALID (not whole pages, not mapped writable, or overlapping a region);
 * LVP_E_BUSY (a checkpoint runs: wait for its job, or cancel it; or the slot's dirty log is in
 * use). Does not block. Thread-safe.
 *
 * Since: 0.1
 */
lvp_status lvp_guest_add_region(lvp_guest *guest, const lvp_guest_region *region);

/**
 * Takes a memory slot off. On return the library touches its memory no more, and the caller may
 * take it from the VM and unmap it.
 *
 * Returns LVP_OK; LVP_E_INVALID (no such slot); LVP_E_BUSY (a checkpoint runs: wait for its job,
 * or cancel it). Blocks until the last thread of an earlier checkpoint has ended: at once, unless
 * storage hangs. Thread-safe.
 *
 * Since: 0.1
 */
lvp_status lvp_guest_remove_region(lvp_guest *guest, uint32_t slot);

/**
 * Starts a live checkpoint; the guest runs on, but for the pause that the protocol needs.
 *
 * @param out      path of the image file to write, or of an existing directory to add an image
 *                 to; borrowed for the call. An image that is there stays whole until the new
 *                 one is complete.
 * @param options  NULL for the defaults
 * @param job_out  receives the job; release it with lvp_job_free()
 *
 * Returns LVP_OK; LVP_E_INVALID; LVP_E_UNSUPPORTED (no region is registered); LVP_E_BUSY (a
 * checkpoint of it runs already); LVP_E_HOST. What goes wrong later is told by lvp_job_wait(),
 * LVP_E_CALLBACK among it. Does not block while memory is copied. Thread-safe.
 *
 * Since: 0.1
 */
lvp_status lvp_guest_checkpoint(lvp_guest *guest,
                                const char *out,
                                const lvp_checkpoint_options *options,
                                lvp_job **job_out);

/**
 * Fills the registered memory from an image. No vCPU runs yet.
 *
 * No byte enters memory before its digest was checked. The state is brought back apart:
 * lvp_image_state(), lvp_kvm_state_restore(), lvp_state_find().
 *
 * @param image    has the very regions that are registered: slots, addresses, lengths
 * @param options  NULL for the defaults
 *
 * Returns LVP_OK; LVP_E_INVALID (also: other regions; the message has the first difference);
 * LVP_E_CORRUPT and LVP_E_IO (memory is half filled then). Blocks while the image is read.
 * Thread-safe.
 *
 * Since: 0.1
 */
lvp_status lvp_guest_fill(lvp_guest *guest,
                          const lvp_image *image,
                          const lvp_fill_options *options);

/**
 * Releases a guest. A checkpoint that runs is cancelled; its job stays valid. NULL is ignored.
 *
 * On return the library calls no callback and touches no memory of the guest any more. Blocks for
 * as long as that takes: 100 ms, unless storage hangs. vCPU threads have left before. Not called
 * from a callback. No other call on this handle may run or follow.
 *
 * Since: 0.1
 */
void lvp_guest_free(lvp_guest *guest);

/**
 * Makes the calling thread the one that runs a vCPU. From now on a pause waits for it.
 *
 * Blocks the kick signal in this thread and lets it through inside KVM_RUN only
 * (KVM_SET_SIGNAL_MASK), where the thread's other signals stay as they are now; the thread keeps
 * the kick signal blocked until lvp_guest_vcpu_leave(). With callbacks->kick neither is done.
 *
 * @param vcpu     from 0 to vcpu_count - 1
 * @param vcpu_fd  the vCPU's descriptor, whose CPUID is set; duplicated
 *
 * Returns LVP_OK; LVP_E_INVALID; LVP_E_STATE (a thread has entered as this vCPU); LVP_E_HOST (not
 * a vCPU's descriptor). Does not block.
 *
 * Since: 0.1
 */
lvp_status lvp_guest_vcpu_enter(lvp_guest *guest, uint32_t vcpu, int vcpu_fd);

/**
 * Lets a vCPU into the guest, or holds it while the guest is paused. The first thing in each turn
 * of the vCPU's loop:
 *
 * ```c
 * for (;;) {
 *     lvp_gate next = lvp_guest_vcpu_gate(guest, n);
 *     if (next < 0)
 *         break;
 *     if (next == LVP_GATE_ENTER && ioctl(vcpu_fd, KVM_RUN, 0) < 0) {
 *         if (errno == EINTR || errno == EAGAIN)
 *             continue;
 *         break;
 *     }
 *     handle_exit(run);
 * }
 * ```
 *
 * While a pause is wanted it completes the vCPU's pending exit first (KVM_RUN with immediate_exit,
 * which is put back to what it was). A flag of the caller's own that ends the loop is looked at
 * after the gate. The thread holds no lock that a callback takes. A thread that will not come back
 * for long, since it waits for something else, leaves first.
 *
 * Returns LVP_GATE_ENTER or LVP_GATE_HANDLE_EXIT; LVP_E_INVALID; LVP_E_STATE (no thread has
 * entered as this vCPU; that it was another one is found out only while a pause is wanted);
 * LVP_E_HOST (KVM cannot complete the exit). Blocks while the guest is paused; else it costs some
 * nanoseconds.
 *
 * Since: 0.1
 */
lvp_gate lvp_guest_vcpu_gate(lvp_guest *guest, uint32_t vcpu);

/**
 * Ends what lvp_guest_vcpu_enter() began, in the same thread: no pause waits for the vCPU any
 * more, and the thread has its signal mask back. The vCPU is not run until a thread enters again;
 * its state can be saved meanwhile.
 *
 * Returns LVP_OK (0); LVP_GATE_HANDLE_EXIT where a pending exit led to another: handle it, then
 * call again; LVP_E_INVALID; LVP_E_STATE (this thread has not entered as this vCPU); LVP_E_HOST.
 * Does not block.
 *
 * Since: 0.1
 */
lvp_gate lvp_guest_vcpu_leave(lvp_guest *guest, uint32_t vcpu);

/**
 * Tells that the VMM wrote guest memory, which KVM's dirty log does not see. Called **after** the
 * write is complete, and before anything that the guest is told about it could be saved.
 *
 * Costs nothing worth mentioning; ranges outside every region are ignored. Needed for every write
 * by the process or the kernel on its behalf (read(2) into guest memory, io_uring, vhost).
 *
 * Returns LVP_OK; LVP_E_INVALID. Does not block. Thread-safe.
 *
 * Since: 0.1
 */
lvp_status lvp_guest_mark_dirty(lvp_guest *guest, uint64_t gpa, uint64_t bytes);

/**
 * Gives memory back to the host (a balloon, free page reporting, unplug) at a time at which that
 * is safe: its bytes are captured first where a checkpoint still needs them, a checkpoint that
 * begins meanwhile waits, and each takes the memory as changed.
 *
 * All of it is work of a device, for whose end the quiesce callback waits.
 *
 * @param discard    called once, by this thread, with the range safe to discard: madvise(2),
 *                   fallocate(2). Must not call lvp_guest_discard(), lvp_guest_add_region(),
 *                   lvp_guest_remove_region() or lvp_guest_free(), nor unwind or longjmp() out.
 * @param user_data  handed to `discard`; not looked at
 *
 * Returns what `discard` returned, which then is that function's own error; LVP_E_INVALID;
 * LVP_E_HOST; with either nothing was called. Blocks while the range is captured, never for
 * storage. Thread-safe.
 *
 * Since: 0.1
 */
lvp_status lvp_guest_discard(lvp_guest *guest,
                             uint64_t gpa,
                             uint64_t bytes,
                             lvp_discard_callback discard,
                             void *user_data);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* LIVEPOINT_H */
