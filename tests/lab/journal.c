/*
 * Appends records to a file, each synced before it is reported; or checks such a file.
 *
 *     journal write FILE [NAME]  prints `journal: N`, or `NAME: N`, once record N is on stable storage
 *     journal check FILE         prints `journal: whole N`, N being the last record; a record that is
 *                                torn, wrong or missing before another is an error
 */
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { RECORD = 512 };

/* Fills a record whose every byte follows from its number. */
static void make(unsigned char *record, uint64_t number)
{
    uint64_t word = number * 0x9e3779b97f4a7c15u + 1;
    memcpy(record, &number, sizeof number);
    for (int at = sizeof number; at < RECORD; at += sizeof word) {
        word ^= word << 13;
        word ^= word >> 7;
        word ^= word << 17;
        memcpy(record + at, &word, sizeof word);
    }
}

static int fail(const char *what)
{
    perror(what);
    printf("journal: FAILED: %s\n", what);
    return 1;
}

static int append(const char *path, const char *name)
{
    unsigned char record[RECORD];
    int file = open(path, O_WRONLY | O_CREAT | O_APPEND, 0644);
    if (file < 0)
        return fail("open");
    for (uint64_t number = 1;; number++) {
        make(record, number);
        if (write(file, record, RECORD) != RECORD)
            return fail("write");
        if (fsync(file) != 0)
            return fail("fsync");
        printf("%s: %llu\n", name, (unsigned long long)number);
        fflush(stdout);
        usleep(20000);
    }
}

static int check(const char *path)
{
    unsigned char record[RECORD], expected[RECORD];
    uint64_t number = 0;
    FILE *file = fopen(path, "rb");
    if (!file)
        return fail("open");
    size_t bytes;
    while ((bytes = fread(record, 1, RECORD, file)) == RECORD) {
        make(expected, number + 1);
        if (memcmp(record, expected, RECORD) != 0) {
            printf("journal: FAILED: record %llu is wrong\n", (unsigned long long)number + 1);
            return 1;
        }
        number++;
    }
    if (bytes != 0) {
        printf("journal: FAILED: record %llu is torn\n", (unsigned long long)number + 1);
        return 1;
    }
    printf("journal: whole %llu\n", (unsigned long long)number);
    return 0;
}

int main(int argc, char **argv)
{
    if (argc >= 3 && strcmp(argv[1], "write") == 0)
        return append(argv[2], argc > 3 ? argv[3] : "journal");
    if (argc == 3 && strcmp(argv[1], "check") == 0)
        return check(argv[2]);
    fprintf(stderr, "usage: journal write FILE [NAME] | check FILE\n");
    return 2;
}
