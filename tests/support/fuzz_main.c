/* Replays a fuzz target without libFuzzer: seeded random bytes, then every file given (or in a
 * folder given) as it is, cut short and with seeded damage, so that the default tests run some
 * thousand inputs through each decoder. Output is TAP; a crash is what makes it fail. */
#include <dirent.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "storage/base/random.h"

#define CUTS 64u
#define DAMAGES 512u
#define RANDOMS 2000u
#define RANDOM_BYTES_MAX 512u
#define PATH_BYTES 4096u

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);
/* A target may have it. */
int LLVMFuzzerInitialize(int *argc, char ***argv) __attribute__((weak));

static uint32_t case_count;

/* In memory of exactly this size, so that a read past the end is seen. */
static void run_one(const uint8_t *data, size_t bytes)
{
    uint8_t *copy = calloc(1, bytes ? bytes : 1);

    if (!copy)
        abort();
    memcpy(copy, data, bytes);
    LLVMFuzzerTestOneInput(copy, bytes);
    free(copy);
}

static void damage(uint8_t *data, size_t bytes, struct random *random)
{
    static const uint8_t notable[] = {0x00, 0x01, 0x7f, 0x80, 0xff, '"', '[', '{', '-', 'e'};
    uint64_t count = 1 + random_below(random, 4);

    for (uint64_t i = 0; i < count; i++) {
        uint64_t at = random_below(random, bytes);

        if (random_below(random, 2))
            data[at] ^= (uint8_t)(1u << random_below(random, 8));
        else
            data[at] = notable[random_below(random, sizeof notable)];
    }
}

static void run_file(const char *path)
{
    FILE *file = fopen(path, "rb");
    struct random random;
    uint8_t *data, *work;
    long bytes;

    if (!file || fseek(file, 0, SEEK_END) || (bytes = ftell(file)) < 0 ||
        fseek(file, 0, SEEK_SET)) {
        fprintf(stderr, "fuzz_main: %s cannot be read\n", path);
        exit(1);
    }
    data = malloc((size_t)bytes + 1);
    work = malloc((size_t)bytes + 1);
    if (!data || !work || fread(data, 1, (size_t)bytes, file) != (size_t)bytes)
        abort();
    fclose(file);
    run_one(data, (size_t)bytes);
    for (uint32_t i = 0; bytes > 0 && i < CUTS; i++)
        run_one(data, (size_t)((uint64_t)bytes * i / CUTS));
    random_init(&random, 1, (uint64_t)bytes);
    for (uint32_t i = 0; bytes > 0 && i < DAMAGES; i++) {
        memcpy(work, data, (size_t)bytes);
        damage(work, (size_t)bytes, &random);
        run_one(work, (size_t)bytes);
    }
    printf("ok %u - %s\n", ++case_count, strrchr(path, '/') ? strrchr(path, '/') + 1 : path);
    fflush(stdout);
    free(data);
    free(work);
}

static void run_random(void)
{
    uint8_t data[RANDOM_BYTES_MAX];
    struct random random;

    random_init(&random, 2, 0);
    for (uint32_t i = 0; i < RANDOMS; i++) {
        size_t bytes = random_below(&random, i % 2 ? RANDOM_BYTES_MAX : 16);

        for (size_t b = 0; b < bytes; b++)
            data[b] = (uint8_t)random_u64(&random);
        run_one(data, bytes);
    }
    printf("ok %u - %u random inputs\n", ++case_count, RANDOMS);
}

static int is_visible(const struct dirent *entry)
{
    return entry->d_name[0] != '.';
}

int main(int argc, char **argv)
{
    if (LLVMFuzzerInitialize)
        LLVMFuzzerInitialize(&argc, &argv);
    run_one((const uint8_t *)"", 0);
    printf("ok %u - nothing at all\n", ++case_count);
    run_random();
    for (int i = 1; i < argc; i++) {
        struct dirent **entries = NULL;
        struct stat info;
        char path[PATH_BYTES];

        if (stat(argv[i], &info) < 0) {
            fprintf(stderr, "fuzz_main: %s is not there\n", argv[i]);
            return 1;
        }
        if (!S_ISDIR(info.st_mode)) {
            run_file(argv[i]);
            continue;
        }
        int count = scandir(argv[i], &entries, is_visible, alphasort);

        for (int e = 0; e < count; e++) {
            snprintf(path, sizeof path, "%s/%s", argv[i], entries[e]->d_name);
            run_file(path);
            free(entries[e]);
        }
        free(entries);
    }
    printf("1..%u\n", case_count);
    return 0;
}
