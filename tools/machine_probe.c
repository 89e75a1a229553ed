/* How it works: everything but the disk is read from /proc and /sys, where a missing file means "no
 * limit" or "not known". The disk is measured with a scratch file that has no name once it is open,
 * so that nothing is left behind however this ends. It is written as a build writes, through the
 * page cache with a sync at the end, and read past the cache, as a search reads. */
#include "tools/machine_probe.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/statvfs.h>
#include <time.h>
#include <unistd.h>

#include "storage/base/pool.h"
#include "storage/base/random.h"
#include "storage/file.h"
#include "storage/reader.h"

#define CHUNK_BYTES (1u << 20)
#define WRITE_SECONDS_MAX 4.0
#define READ_SECONDS_MAX 1.0
#define RANDOM_SECONDS 0.3
#define RANDOM_READS_MAX 4096u
#define LEAST_BYTES (8ull << 20)

static double now_seconds(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

/* ---- disk ---- */

struct probe_file {
    struct vfs_file *file; /* opened past the cache */
    char path[FILE_PATH_MAX];
    uint8_t *buffer; /* CHUNK_BYTES */
    uint64_t bytes;
};

/* Incompressible, for disks that compress. */
static void fill(uint8_t *buffer)
{
    struct random random;

    random_init(&random, (uint64_t)getpid(), 3);
    for (uint32_t i = 0; i < CHUNK_BYTES / 8; i++) {
        uint64_t word = random_u64(&random);

        memcpy(buffer + 8 * i, &word, 8);
    }
}

static int write_all(struct probe_file *p, uint64_t bytes, struct machine_disk *out,
                     struct error *err)
{
    struct vfs_file *file = file_open(vfs_posix(), p->path, VFS_WRITE | VFS_CREATE, err);
    double began, seconds = 0;
    int rc = -1;

    if (!file)
        return -1;
    began = now_seconds();
    while (p->bytes < bytes && (seconds < WRITE_SECONDS_MAX || p->bytes < LEAST_BYTES)) {
        if (file_write_full(file, p->path, p->buffer, CHUNK_BYTES, p->bytes, err) < 0)
            goto done;
        p->bytes += CHUNK_BYTES;
        seconds = now_seconds() - began;
    }
    if (file_sync(file, p->path, err) < 0)
        goto done;
    out->write_per_second = (double)p->bytes / (now_seconds() - began);
    p->file = file_open(vfs_posix(), p->path, VFS_READ | VFS_DIRECT, err);
    rc = p->file ? 0 : -1;
done:
    vfs_posix()->unlink(vfs_posix(), p->path);
    file_close(file, p->path, NULL);
    return rc;
}

static int read_in_sequence(struct probe_file *p, struct machine_disk *out, struct error *err)
{
    double began = now_seconds(), seconds = 0;
    uint64_t done = 0;

    out->direct = (fcntl(p->file->fd, F_GETFL) & O_DIRECT) != 0;
    while (done < p->bytes && seconds < READ_SECONDS_MAX) {
        if (file_read_exact(p->file, p->path, p->buffer, CHUNK_BYTES, done, err) < 0)
            return -1;
        done += CHUNK_BYTES;
        seconds = now_seconds() - began;
    }
    out->read_per_second = (double)done / (seconds > 0 ? seconds : 1e-9);
    return 0;
}

static int compare_double(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;

    return (x > y) - (x < y);
}

static int read_one_by_one(struct probe_file *p, struct random *random, struct machine_disk *out,
                           struct error *err)
{
    double *seconds = malloc(RANDOM_READS_MAX * sizeof *seconds), began = now_seconds(), at = began;
    uint32_t count = 0;
    int rc = -1;

    if (!seconds)
        return error_set(err, ERR_NOMEM, "no memory to measure a disk");
    while (count < RANDOM_READS_MAX && at - began < RANDOM_SECONDS) {
        uint64_t block = random_below(random, p->bytes / FILE_BLOCK_BYTES);
        double end;

        if (file_read_exact(p->file, p->path, p->buffer, FILE_BLOCK_BYTES, block * FILE_BLOCK_BYTES,
                            err) < 0)
            goto done;
        end = now_seconds();
        seconds[count++] = end - at;
        at = end;
    }
    qsort(seconds, count, sizeof *seconds, compare_double);
    out->random_seconds = seconds[count / 2];
    rc = 0;
done:
    free(seconds);
    return rc;
}

/* A read gets another block and goes again until the time is over. */
static int read_many(struct probe_file *p, struct random *random, struct machine_disk *out,
                     struct error *err)
{
    struct reader_read reads[MACHINE_DISK_DEPTH], *again[MACHINE_DISK_DEPTH];
    uint32_t count = MACHINE_DISK_DEPTH;
    struct reader *reader = NULL;
    uint64_t finished = 0;
    double began, seconds = 0;
    int failed = 0;

    if (reader_open(READER_AUTO, MACHINE_DISK_DEPTH, &reader, err) < 0)
        return -1;
    memset(reads, 0, sizeof reads);
    for (uint32_t i = 0; i < MACHINE_DISK_DEPTH; i++) {
        reads[i].file = p->file;
        reads[i].bytes = FILE_BLOCK_BYTES;
        reads[i].buffer = p->buffer + (uint64_t)i * FILE_BLOCK_BYTES;
        again[i] = &reads[i];
    }
    began = now_seconds();
    while (count && seconds < RANDOM_SECONDS && !failed) {
        for (uint32_t i = 0; i < count; i++)
            again[i]->offset = random_below(random, p->bytes / FILE_BLOCK_BYTES) * FILE_BLOCK_BYTES;
        reader_submit(reader, again, count, NULL); /* what fails comes back with its error */
        count = reader_wait(reader, again, MACHINE_DISK_DEPTH, true);
        for (uint32_t i = 0; i < count; i++)
            failed = again[i]->error ? again[i]->error : failed;
        finished += count;
        seconds = now_seconds() - began;
    }
    reader_close(reader);
    if (failed)
        return error_set_errno(err, failed, "reading %s failed", p->path);
    out->random_per_second = (double)finished / (seconds > 0 ? seconds : 1e-9);
    return 0;
}

int machine_probe_disk(const char *folder, uint64_t bytes, struct machine_disk *out,
                       struct error *err)
{
    struct probe_file p = {.buffer = file_buffer_alloc(CHUNK_BYTES)};
    char name[64];
    struct random random;
    struct vfs_stat st;
    int rc = -1;

    memset(out, 0, sizeof *out);
    if (!p.buffer) {
        error_set(err, ERR_NOMEM, "no memory to measure a disk");
        goto done;
    }
    snprintf(name, sizeof name, ".annd-probe-%ld", (long)getpid());
    if (file_stat(vfs_posix(), folder, &st, err) < 0 ||
        file_path_join(p.path, folder, name, err) < 0)
        goto done;
    if (st.kind != VFS_DIRECTORY) {
        error_set(err, ERR_INVALID, "%s is not a folder", folder);
        goto done;
    }
    if (vfs_posix()->space(vfs_posix(), folder, &out->free_bytes) < 0)
        out->free_bytes = UINT64_MAX;
    /* Others need what little there is. */
    if (bytes > out->free_bytes / 4)
        bytes = out->free_bytes / 4;
    if (bytes < LEAST_BYTES) {
        error_set(err, ERR_BUDGET, "%s has %llu MiB free, too little to measure the disk", folder,
                  (unsigned long long)out->free_bytes >> 20);
        goto done;
    }
    fill(p.buffer);
    random_init(&random, 1, 4);
    if (write_all(&p, bytes, out, err) < 0 || read_in_sequence(&p, out, err) < 0 ||
        read_one_by_one(&p, &random, out, err) < 0 || read_many(&p, &random, out, err) < 0)
        goto done;
    out->probe_bytes = p.bytes;
    rc = 0;
done:
    file_close(p.file, p.path, NULL);
    free(p.buffer);
    return rc;
}

/* ---- memory ---- */

/* First number after `label` at the beginning of a line of a small file; 0 when there is none. */
static uint64_t kernel_number(const char *path, const char *label)
{
    char line[512];
    unsigned long long value = 0;
    FILE *file = fopen(path, "re");

    if (!file)
        return 0;
    while (fgets(line, sizeof line, file)) {
        if (strncmp(line, label, strlen(label)) == 0 &&
            sscanf(line + strlen(label), "%llu", &value) == 1)
            break;
    }
    fclose(file);
    return value;
}

/* The path of this process in a hierarchy: version 2 has the number 0, version 1 a name. */
static bool cgroup_path(const char *controller, char *out, size_t bytes)
{
    char line[FILE_PATH_MAX];
    bool found = false;
    FILE *file = fopen("/proc/self/cgroup", "re");

    if (!file)
        return false;
    while (!found && fgets(line, sizeof line, file)) {
        char *names = strchr(line, ':'), *path = names ? strchr(names + 1, ':') : NULL;

        if (!path)
            continue;
        *path++ = 0;
        path[strcspn(path, "\n")] = 0;
        if (!controller) {
            found = names[1] == 0;
        } else {
            for (char *save, *name = strtok_r(names + 1, ",", &save); name;
                 name = strtok_r(NULL, ",", &save))
                found = found || !strcmp(name, controller);
        }
        if (found)
            snprintf(out, bytes, "%s", strcmp(path, "/") ? path : "");
    }
    fclose(file);
    return found;
}

/* Limits bind from the root down: the group itself and all above it. */
static void cgroup_limits(const char *root, char *path, const char *limit_name,
                          const char *used_name, struct machine_memory *out)
{
    char file[2 * FILE_PATH_MAX];

    for (;;) {
        uint64_t limit;

        snprintf(file, sizeof file, "%s%s/%s", root, path, limit_name);
        limit = kernel_number(file, "");
        /* Version 1 writes a huge number for none; nothing above the machine's memory binds. */
        if (limit && limit < out->total_bytes &&
            (!out->cgroup_bytes || limit < out->cgroup_bytes)) {
            out->cgroup_bytes = limit;
            snprintf(file, sizeof file, "%s%s/%s", root, path, used_name);
            out->cgroup_used_bytes = kernel_number(file, "");
        }
        if (!*path)
            return;
        *strrchr(path, '/') = 0;
    }
}

void machine_probe_memory(struct machine_memory *out)
{
    char path[FILE_PATH_MAX];

    memset(out, 0, sizeof *out);
    out->total_bytes = (uint64_t)sysconf(_SC_PHYS_PAGES) * (uint64_t)sysconf(_SC_PAGESIZE);
    out->available_bytes = kernel_number("/proc/meminfo", "MemAvailable:") * 1024;
    if (!out->available_bytes)
        out->available_bytes = out->total_bytes;
    /* Inside a container the path is often that of the host: then the root is the group itself. */
    if (cgroup_path(NULL, path, sizeof path))
        cgroup_limits("/sys/fs/cgroup", path, "memory.max", "memory.current", out);
    if (cgroup_path("memory", path, sizeof path))
        cgroup_limits("/sys/fs/cgroup/memory", path, "memory.limit_in_bytes",
                      "memory.usage_in_bytes", out);
}

uint64_t machine_memory_usable(const struct machine_memory *memory)
{
    uint64_t bytes = memory->available_bytes, left;

    if (!memory->cgroup_bytes)
        return bytes;
    /* What the group uses is mostly page cache, which gives way; so the limit itself counts. */
    left = memory->cgroup_bytes;
    return left < bytes ? left : bytes;
}

/* ---- processors ---- */

static double cgroup_quota(void)
{
    char path[FILE_PATH_MAX], file[2 * FILE_PATH_MAX];
    unsigned long long quota, period;
    double cpus = 0;
    FILE *f;

    if (cgroup_path(NULL, path, sizeof path)) {
        snprintf(file, sizeof file, "/sys/fs/cgroup%s/cpu.max", path);
        f = fopen(file, "re");
        if (f && fscanf(f, "%llu %llu", &quota, &period) == 2 && period)
            cpus = (double)quota / (double)period;
        if (f)
            fclose(f);
    }
    if (!(cpus > 0) && cgroup_path("cpu", path, sizeof path)) {
        snprintf(file, sizeof file, "/sys/fs/cgroup/cpu%s/cpu.cfs_period_us", path);
        period = kernel_number(file, "");
        snprintf(file, sizeof file, "/sys/fs/cgroup/cpu%s/cpu.cfs_quota_us", path);
        f = fopen(file, "re");
        if (f) {
            long long signed_quota;

            if (fscanf(f, "%lld", &signed_quota) == 1 && signed_quota > 0 && period)
                cpus = (double)signed_quota / (double)period;
            fclose(f);
        }
    }
    return cpus;
}

void machine_probe_cpu(struct machine_cpu *out)
{
    char line[512];
    double load[1] = {0};
    FILE *file;

    memset(out, 0, sizeof *out);
    snprintf(out->model, sizeof out->model, "unknown");
    out->online = (uint32_t)sysconf(_SC_NPROCESSORS_ONLN);
    out->allowed = cpu_count();
    out->quota = cgroup_quota();
    if (getloadavg(load, 1) == 1)
        out->load = load[0];
    file = fopen("/proc/cpuinfo", "re");
    while (file && fgets(line, sizeof line, file)) {
        char *value = strchr(line, ':');

        if (strncmp(line, "model name", 10) || !value)
            continue;
        value += strspn(value, ": \t");
        snprintf(out->model, sizeof out->model, "%.*s", (int)strcspn(value, "\n"), value);
        break;
    }
    if (file)
        fclose(file);
}
