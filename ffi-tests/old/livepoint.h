/*
 * livepoint: virtual machines on KVM that are saved while they keep running.
 *
 * Link with -llivepoint. Every function may be called from any thread. Text is UTF-8. Threads
 * that the library starts have every signal blocked; it installs no signal handler and no
 * logger, keeps no global state but each thread's last error text, and never ends the process.
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
 * What came of a call. Negative values are errors; a program must expect values that it does not
 * know, since later versions may add some. Values are never reused.
 */
typedef int32_t lvp_status;

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
} lvp_checkpoint_options;

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
 * Returns a descriptor that becomes readable when the job has ended, for poll(2) and the like.
 *
 * Owned by the job: do not read, write or close it; it is closed by lvp_job_free(). Returns -1
 * when `job` is NULL. Does not block. Thread-safe.
 *
 * Since: 0.1
 */
int lvp_job_fd(const lvp_job *job);

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

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* LIVEPOINT_H */
