/* What the test programs share. */
#ifndef CHECK_H
#define CHECK_H

#include <livepoint.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define CHECK(call)                                                                          \
    do {                                                                                     \
        lvp_status status_ = (call);                                                         \
        if (status_ != LVP_OK) {                                                             \
            fprintf(stderr, "%s:%d: %s: status %d: %s\n", __FILE__, __LINE__, #call,         \
                    (int)status_, lvp_error_message());                                      \
            exit(1);                                                                         \
        }                                                                                    \
    } while (0)

#define EXPECT(condition)                                                                    \
    do {                                                                                     \
        if (!(condition)) {                                                                  \
            fprintf(stderr, "%s:%d: not so: %s (%s)\n", __FILE__, __LINE__, #condition,      \
                    lvp_error_message());                                                    \
            exit(1);                                                                         \
        }                                                                                    \
    } while (0)

/* The call fails with this status, and says why. */
#define REFUSED(call, wanted)                                                                \
    do {                                                                                     \
        lvp_status status_ = (call);                                                         \
        if (status_ != (wanted) || strlen(lvp_error_message()) == 0) {                       \
            fprintf(stderr, "%s:%d: %s: status %d instead of %s: %s\n", __FILE__, __LINE__,  \
                    #call, (int)status_, #wanted, lvp_error_message());                      \
            exit(1);                                                                         \
        }                                                                                    \
    } while (0)

/*
 * A struct of options as other headers have it. `call` uses `options`, and must come to `wanted`
 * with `value`: with the members of the first header alone, and with members of a later one that
 * are zero. One that is set is refused, and so is a size that no header ever had.
 */
#define OPTIONS_GROW(type, first_bytes, value, call, wanted)                                 \
    do {                                                                                     \
        struct {                                                                             \
            type known;                                                                      \
            unsigned char more[64];                                                          \
        } later;                                                                             \
        memset(&later, 0, sizeof later);                                                     \
        later.known = (value);                                                               \
        type *options = &later.known;                                                        \
        const size_t sizes[] = {(first_bytes), sizeof(type), sizeof later};                  \
        for (int size_ = 0; size_ < 3; size_++) {                                            \
            options->struct_size = sizes[size_];                                             \
            EXPECT((call) == (wanted));                                                      \
        }                                                                                    \
        later.more[63] = 1;                                                                  \
        REFUSED(call, LVP_E_INVALID);                                                        \
        EXPECT(strstr(lvp_error_message(), "does not know") != NULL);                        \
        const size_t wrong[] = {0, (first_bytes) - 1, 4097, SIZE_MAX};                       \
        for (int size_ = 0; size_ < 4; size_++) {                                            \
            options->struct_size = wrong[size_];                                             \
            REFUSED(call, LVP_E_INVALID);                                                    \
            EXPECT(strstr(lvp_error_message(), "struct_size") != NULL);                      \
        }                                                                                    \
    } while (0)

/*
 * A struct of results as other headers have it. `call` fills `*result` and must come to `wanted`.
 * What the caller has more than the library, or less, is left alone.
 */
#define RESULT_GROWS(type, first_bytes, call, wanted)                                        \
    do {                                                                                     \
        struct {                                                                             \
            type known;                                                                      \
            unsigned char more[64];                                                          \
        } later;                                                                             \
        type *result = &later.known;                                                         \
        const size_t sizes[] = {(first_bytes), sizeof later};                                \
        for (int size_ = 0; size_ < 2; size_++) {                                            \
            size_t filled = size_ == 0 ? (first_bytes) : sizeof(type);                       \
            memset(&later, 0x5a, sizeof later);                                              \
            result->struct_size = sizes[size_];                                              \
            EXPECT((call) == (wanted));                                                      \
            EXPECT(result->struct_size == sizes[size_]);                                     \
            for (size_t at_ = filled; at_ < sizeof later; at_++)                             \
                EXPECT(((unsigned char *)&later)[at_] == 0x5a);                              \
        }                                                                                    \
        result->struct_size = (first_bytes) - 1;                                             \
        REFUSED(call, LVP_E_INVALID);                                                        \
        EXPECT(strstr(lvp_error_message(), "struct_size") != NULL);                          \
    } while (0)

static inline void sleep_ms(long ms)
{
    struct timespec time = {.tv_sec = ms / 1000, .tv_nsec = ms % 1000 * 1000000};
    nanosleep(&time, NULL);
}

#endif
