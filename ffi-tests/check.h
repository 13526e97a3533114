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

static inline void sleep_ms(long ms)
{
    struct timespec time = {.tv_sec = ms / 1000, .tv_nsec = ms % 1000 * 1000000};
    nanosleep(&time, NULL);
}

#endif
