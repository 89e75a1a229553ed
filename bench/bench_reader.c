/* bench_reader: random 4 KiB reads of one file through storage/reader, io_uring against pread.
 *
 *   bench_reader FILE [SECONDS]      SECONDS per point and backend, default 2
 *
 * One thread keeps `depth` reads in flight: it takes what is complete, counts it and sends as many
 * new ones. The pread backend has up to 32 threads of its own behind that, so above depth 32 it
 * queues. `us cpu` is processor time of the whole process per read, both sides of the kernel. The
 * file should be larger than the machine's memory, or on a file system that honours O_DIRECT. */
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "storage/base/error.h"
#include "storage/base/random.h"
#include "storage/file.h"
#include "storage/reader.h"
#include "storage/vfs.h"

#define DEPTH_MAX 128u

struct point {
    double reads_per_second;
    double cpu_us_per_read;
};

static double wall_seconds(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

static double cpu_seconds(void)
{
    struct timespec now;

    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
    return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

static int measure(enum reader_backend backend, uint32_t depth, struct vfs_file *file,
                   uint64_t block_count, double seconds, struct point *out, struct error *err)
{
    struct reader *reader = NULL;
    struct reader_read reads[DEPTH_MAX];
    struct reader_read *batch[DEPTH_MAX];
    uint8_t *memory = file_buffer_alloc((size_t)depth * FILE_BLOCK_BYTES);
    struct random random;
    double wall_start, cpu_start, wall;
    uint64_t finished = 0;
    uint32_t count = depth;
    int rc = -1;

    if (!memory) {
        error_set(err, ERR_NOMEM, "no memory for %u blocks", depth);
        goto done;
    }
    if (reader_open(backend, depth, &reader, err) < 0)
        goto done;
    random_init(&random, 42, depth);
    memset(reads, 0, sizeof reads);
    for (uint32_t i = 0; i < depth; i++) {
        reads[i].file = file;
        reads[i].bytes = FILE_BLOCK_BYTES;
        reads[i].buffer = memory + (size_t)i * FILE_BLOCK_BYTES;
        batch[i] = &reads[i];
    }
    wall_start = wall_seconds();
    cpu_start = cpu_seconds();
    do {
        for (uint32_t i = 0; i < count; i++)
            batch[i]->offset = random_below(&random, block_count) * FILE_BLOCK_BYTES;
        if (reader_submit(reader, batch, count, err) < 0)
            goto done;
        count = reader_wait(reader, batch, depth, true);
        for (uint32_t i = 0; i < count; i++) {
            if (batch[i]->error) {
                error_set_errno(err, batch[i]->error, "read at offset %llu",
                                (unsigned long long)batch[i]->offset);
                goto done;
            }
        }
        finished += count;
        wall = wall_seconds() - wall_start;
    } while (wall < seconds);
    out->reads_per_second = (double)finished / wall;
    out->cpu_us_per_read = (cpu_seconds() - cpu_start) * 1e6 / (double)finished;
    rc = 0;
done:
    reader_close(reader);
    free(memory);
    return rc;
}

int main(int argc, char **argv)
{
    struct error err = ERROR_INIT;
    struct vfs_file *file = NULL;
    char reason[256];
    char *end = NULL;
    double seconds = argc > 2 ? strtod(argv[2], &end) : 2.0;
    enum reader_backend best = reader_probe(reason);
    uint64_t bytes = 0;
    int rc = 1;

    if (argc < 2 || argc > 3 || (end && *end) || !(seconds > 0 && seconds <= 3600)) {
        fprintf(stderr, "usage: bench_reader FILE [SECONDS per point, default 2]\n");
        return 2;
    }
    file = file_open(vfs_posix(), argv[1], VFS_READ | VFS_DIRECT, &err);
    if (!file || file_size(file, argv[1], &bytes, &err) < 0)
        goto done;
    if (bytes < FILE_BLOCK_BYTES) {
        error_set(&err, ERR_INVALID, "%s has %llu bytes, wanted at least %u", argv[1],
                  (unsigned long long)bytes, FILE_BLOCK_BYTES);
        goto done;
    }
    printf("%s: %.1f MiB, O_DIRECT %s, %g s per point\n", argv[1], (double)bytes / (1 << 20),
           fcntl(file->fd, F_GETFL) & O_DIRECT ? "on" : "off (page cache)", seconds);
    if (best != READER_URING)
        printf("no io_uring: %s\n", reason);
    printf("%5s %12s %9s %12s %9s %12s\n", "depth", "uring reads/s", "us cpu", "pread reads/s",
           "us cpu", "uring/pread");
    for (uint32_t depth = 1; depth <= DEPTH_MAX; depth *= 2) {
        struct point ring = {0}, pool = {0};

        if (best == READER_URING &&
            measure(READER_URING, depth, file, bytes / FILE_BLOCK_BYTES, seconds, &ring, &err) < 0)
            goto done;
        if (measure(READER_PREAD, depth, file, bytes / FILE_BLOCK_BYTES, seconds, &pool, &err) < 0)
            goto done;
        printf("%5u %13.0f %9.2f %13.0f %9.2f %11.2f\n", depth, ring.reads_per_second,
               ring.cpu_us_per_read, pool.reads_per_second, pool.cpu_us_per_read,
               ring.reads_per_second / pool.reads_per_second);
        fflush(stdout);
    }
    rc = 0;
done:
    if (rc != 0)
        fprintf(stderr, "bench_reader: %s\n", err.message);
    file_close(file, argv[1], NULL);
    return rc;
}
