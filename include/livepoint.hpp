// SPDX-License-Identifier: Apache-2.0 OR MIT
//
// livepoint for C++17: handles that release themselves, and errors as exceptions. Header only; all
// of it is a thin layer over livepoint.h, which documents what happens.
//
// Exceptions are thrown to C++ callers only, never through a C function: a callback of
// lvp_guest_callbacks must not let one out.
#ifndef LIVEPOINT_HPP
#define LIVEPOINT_HPP

#include <livepoint.h>

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace livepoint {

/// A call that failed: its status, and the library's text.
class error : public std::runtime_error {
public:
    error(lvp_status status, const char *text)
        : std::runtime_error(text != nullptr ? text : ""), status_(status)
    {
    }
    lvp_status status() const noexcept { return status_; }

private:
    lvp_status status_;
};

/// Throws where a call failed.
inline void check(lvp_status status)
{
    if (status != LVP_OK)
        throw error(status, lvp_error_message());
}

namespace detail {
struct deleter {
    void operator()(lvp_machine *handle) const noexcept { lvp_machine_free(handle); }
    void operator()(lvp_job *handle) const noexcept { lvp_job_free(handle); }
    void operator()(lvp_events *handle) const noexcept { lvp_events_free(handle); }
    void operator()(lvp_image *handle) const noexcept { lvp_image_free(handle); }
    void operator()(lvp_state *handle) const noexcept { lvp_state_free(handle); }
    void operator()(lvp_guest *handle) const noexcept { lvp_guest_free(handle); }
    void operator()(char *text) const noexcept { lvp_string_free(text); }
};
template <class T> using owned = std::unique_ptr<T, deleter>;

/// Takes text that the library gave away.
inline std::string take(char *text)
{
    owned<char> holder(text);
    return holder ? std::string(holder.get()) : std::string();
}

/// Returns a struct with its size set and all else zero.
template <class T> T sized()
{
    T value{};
    value.struct_size = sizeof value;
    return value;
}
} // namespace detail

/// Options of a checkpoint with their size set.
inline lvp_checkpoint_options checkpoint_options()
{
    return detail::sized<lvp_checkpoint_options>();
}

/// A checkpoint under way or done.
class job {
public:
    explicit job(lvp_job *handle) noexcept : handle_(handle) {}
    /// Waits for the end; throws the job's own error.
    void wait() const
    {
        lvp_status status = lvp_job_wait(handle_.get(), -1);
        if (status != LVP_OK)
            throw error(status, lvp_job_error(handle_.get()));
    }
    /// Readable when the job has ended, for poll(2).
    int fd() const noexcept { return lvp_job_fd(handle_.get()); }
    void cancel() { check(lvp_job_cancel(handle_.get())); }
    lvp_progress progress() const
    {
        auto value = detail::sized<lvp_progress>();
        check(lvp_job_progress(handle_.get(), &value));
        return value;
    }
    lvp_statistics statistics() const
    {
        auto value = detail::sized<lvp_statistics>();
        check(lvp_job_statistics(handle_.get(), &value));
        return value;
    }
    /// The number that events have.
    std::uint64_t number() const noexcept { return lvp_job_number(handle_.get()); }
    lvp_job *get() const noexcept { return handle_.get(); }

private:
    detail::owned<lvp_job> handle_;
};

/// What happens to a machine from some moment on.
class events {
public:
    explicit events(lvp_events *handle) noexcept : handle_(handle) {}
    /// Readable while an event waits, for poll(2).
    int fd() const noexcept { return lvp_events_fd(handle_.get()); }
    /// Takes the next event; false where none came within `timeout_ms`, or none will.
    bool next(lvp_event &event, std::int64_t timeout_ms = -1)
    {
        event = detail::sized<lvp_event>();
        lvp_status status = lvp_events_next(handle_.get(), timeout_ms, &event);
        if (status == LVP_E_TIMEOUT || status == LVP_E_NOT_FOUND)
            return false;
        check(status);
        return true;
    }

private:
    detail::owned<lvp_events> handle_;
};

/// A virtual machine of this library's.
class machine {
public:
    explicit machine(const std::string &xml, const char *runtime_dir = nullptr)
    {
        auto options = detail::sized<lvp_machine_options>();
        options.runtime_dir = runtime_dir;
        lvp_machine *handle = nullptr;
        check(lvp_machine_new(xml.c_str(), &options, &handle));
        handle_.reset(handle);
    }
    static machine restore(const std::string &image, const char *runtime_dir = nullptr)
    {
        auto options = detail::sized<lvp_machine_options>();
        options.runtime_dir = runtime_dir;
        lvp_machine *handle = nullptr;
        check(lvp_machine_restore(image.c_str(), &options, &handle));
        return machine(handle);
    }
    void start() { check(lvp_machine_start(handle_.get())); }
    void pause() { check(lvp_machine_pause(handle_.get())); }
    void resume() { check(lvp_machine_resume(handle_.get())); }
    void reset() { check(lvp_machine_reset(handle_.get())); }
    /// Puts it back to an image of it, in place; without one to its last incremental checkpoint.
    void rewind(const char *image = nullptr) { check(lvp_machine_rewind(handle_.get(), image)); }
    void shutdown() { check(lvp_machine_shutdown(handle_.get())); }
    void destroy() { check(lvp_machine_destroy(handle_.get())); }
    lvp_machine_state state() const
    {
        lvp_machine_state value = 0;
        check(lvp_machine_get_state(handle_.get(), &value));
        return value;
    }
    /// Waits for the end; false where it still runs after `timeout_ms`.
    bool wait(std::int64_t timeout_ms = -1) const
    {
        lvp_status status = lvp_machine_wait(handle_.get(), timeout_ms, nullptr);
        if (status == LVP_E_TIMEOUT)
            return false;
        check(status);
        return true;
    }
    job checkpoint(const std::string &out,
                   const lvp_checkpoint_options &options = checkpoint_options())
    {
        lvp_job *handle = nullptr;
        check(lvp_machine_checkpoint(handle_.get(), out.c_str(), &options, &handle));
        return job(handle);
    }
    livepoint::events events()
    {
        lvp_events *handle = nullptr;
        check(lvp_machine_events(handle_.get(), nullptr, nullptr, &handle));
        return livepoint::events(handle);
    }
    /// Opens a serial console; the caller closes the descriptor.
    int console(unsigned number = 0)
    {
        int fd = -1;
        check(lvp_machine_console(handle_.get(), number, &fd));
        return fd;
    }
    /// Name, state, memory and more, as JSON.
    std::string inspect() const
    {
        char *text = nullptr;
        check(lvp_machine_inspect(handle_.get(), &text));
        return detail::take(text);
    }
    lvp_machine *get() const noexcept { return handle_.get(); }

private:
    explicit machine(lvp_machine *handle) noexcept : handle_(handle) {}
    detail::owned<lvp_machine> handle_;
};

/// An image that is open for reading.
class image {
public:
    explicit image(const std::string &path)
    {
        lvp_image *handle = nullptr;
        check(lvp_image_open(path.c_str(), &handle));
        handle_.reset(handle);
    }
    void verify() const { check(lvp_image_verify(handle_.get())); }
    std::string inspect() const
    {
        char *text = nullptr;
        check(lvp_image_inspect(handle_.get(), &text));
        return detail::take(text);
    }
    /// Reads guest memory at a guest physical address.
    std::vector<std::uint8_t> read(std::uint64_t gpa, std::size_t bytes) const
    {
        std::vector<std::uint8_t> buffer(bytes);
        check(lvp_image_read(handle_.get(), gpa, buffer.data(), bytes));
        return buffer;
    }
    lvp_image *get() const noexcept { return handle_.get(); }

private:
    detail::owned<lvp_image> handle_;
};

} // namespace livepoint

#endif
