/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/*
 * Says what an image holds, checks every digest of it, and checks a domain's XML. Needs no KVM.
 *
 *     cc inspect_image.c $(pkg-config --cflags --libs livepoint) -o inspect_image
 *     ./inspect_image IMAGE [DOMAIN.xml]
 */
#include <livepoint.h>
#include <stdio.h>
#include <stdlib.h>

static int failed(const char *what)
{
    fprintf(stderr, "%s: %s\n", what, lvp_error_message());
    return 1;
}

/* Returns the whole of a file as text, which the caller frees; NULL if it cannot be read. */
static char *read_text(const char *path)
{
    FILE *file = fopen(path, "rb");
    char *text = NULL;
    size_t size = 0, room = 0;

    if (!file)
        return NULL;
    do {
        if (room - size < 2) {
            char *more = realloc(text, room = 2 * room + 4096);
            if (!more)
                break;
            text = more;
        }
        size += fread(text + size, 1, room - size - 1, file);
    } while (!feof(file) && !ferror(file));
    if (!feof(file)) {
        free(text);
        text = NULL;
    }
    if (text)
        text[size] = '\0';
    fclose(file);
    return text;
}

static int check_image(const char *path)
{
    lvp_image *image = NULL;
    char *described = NULL;
    int wrong = 0;

    if (lvp_image_open(path, &image) != LVP_OK)
        return failed(path);
    if (lvp_image_inspect(image, &described) == LVP_OK)
        printf("%s\n", described);
    else
        wrong = failed(path);
    lvp_string_free(described);
    for (size_t i = 0; i < lvp_image_range_count(image); i++) {
        lvp_image_range range = {.struct_size = sizeof range};
        if (lvp_image_get_range(image, i, &range) == LVP_OK)
            printf("memory: %llu bytes at %#llx\n", (unsigned long long)range.bytes,
                   (unsigned long long)range.gpa);
    }
    if (lvp_image_verify(image) == LVP_OK)
        printf("every digest holds\n");
    else
        wrong = failed(path);
    lvp_image_free(image);
    return wrong;
}

static int check_domain(const char *path)
{
    lvp_xml_place place = {.struct_size = sizeof place};
    char *xml = read_text(path), *canonical = NULL;
    int wrong = 0;

    if (!xml) {
        perror(path);
        return 1;
    }
    if (lvp_domain_check(xml, &canonical, &place) == LVP_OK) {
        printf("%s", canonical);
    } else {
        fprintf(stderr, "%s:%u:%u: ", path, place.line, place.column);
        wrong = failed(place.element);
    }
    lvp_string_free(canonical);
    free(xml);
    return wrong;
}

int main(int argc, char **argv)
{
    if (argc < 2 || argc > 3) {
        fprintf(stderr, "usage: %s IMAGE [DOMAIN.xml]\n", argv[0]);
        return 2;
    }
    printf("livepoint %s\n", lvp_version_string());
    return check_image(argv[1]) | (argc > 2 ? check_domain(argv[2]) : 0);
}
