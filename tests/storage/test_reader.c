/* storage/reader: both backends against the same tests, plus what only io_uring can do wrong. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <errno.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "storage/base/random.h"
#include "storage/file.h"
#include "storage/reader.h"
#include "storage/reader_internal.h"
#include "storage/vfs.h"

#define NR_IO_URING_SETUP 425 /* the same on every architecture */
#define NR_IO_URING_ENTER 426

#define BLOCK FILE_BLOCK_BYTES
#define FILE_BLOCKS 512u
#define TAIL_BYTES 100u /* the file is no multiple of a block */
#define FILE_BYTES (FILE_BLOCKS * BLOCK + TAIL_BYTES)
#define READ_BLOCKS_MAX 8u

static char folder[] = "/var/tmp/annd_test_reader_XXXXXX";
static char path[sizeof folder + 16];
static uint8_t *content; /* FILE_BYTES */

/* ---- a vfs that bends results, the same way for pread and for completions ---- */

enum bend {
    BEND_NONE,
    BEND_SHORT,     /* the first bend_count results lose their second half and some bytes */
    BEND_ERROR,     /* results inside the block at bend_offset become -bend_errno */
    BEND_INTERRUPT, /* the first bend_count results become -bend_errno */
    BEND_TRICKLE    /* every result is 100 bytes */
};

struct bent_vfs {
    struct vfs ops;
    struct vfs *below;
    enum bend bend;
    uint64_t bend_offset;
    int bend_errno;
    bool hide_descriptor;
    atomic_int bend_count;
    atomic_int result_count;
};

struct bent_file {
    struct vfs_file base;
    struct vfs_file *below;
};

static int64_t bend_result(struct bent_vfs *vfs, uint64_t offset, size_t bytes, int64_t result)
{
    atomic_fetch_add(&vfs->result_count, 1);
    switch (vfs->bend) {
    case BEND_NONE:
        break;
    case BEND_SHORT:
        if (result > 1000 && atomic_fetch_sub(&vfs->bend_count, 1) > 0)
            return result / 2 + 904;
        break;
    case BEND_ERROR:
        if (offset <= vfs->bend_offset && vfs->bend_offset < offset + bytes)
            return -vfs->bend_errno;
        break;
    case BEND_INTERRUPT:
        if (atomic_fetch_sub(&vfs->bend_count, 1) > 0)
            return -vfs->bend_errno;
        break;
    case BEND_TRICKLE:
        return 100;
    }
    return result;
}

static int bent_open(struct vfs *vfs, const char *name, unsigned flags, struct vfs_file **out)
{
    struct bent_vfs *bent = (struct bent_vfs *)vfs;
    struct bent_file *file = calloc(1, sizeof *file);
    int rc = bent->below->open(bent->below, name, flags, &file->below);

    if (rc < 0) {
        free(file);
        return rc;
    }
    file->base.vfs = vfs;
    file->base.fd = bent->hide_descriptor ? -1 : file->below->fd;
    *out = &file->base;
    return 0;
}

static int bent_close(struct vfs_file *base)
{
    struct bent_file *file = (struct bent_file *)base;
    int rc = file->below->vfs->close(file->below);

    free(file);
    return rc;
}

static int bent_pread(struct vfs_file *base, void *buffer, size_t bytes, uint64_t offset,
                      size_t *got)
{
    struct bent_file *file = (struct bent_file *)base;
    int rc = file->below->vfs->pread(file->below, buffer, bytes, offset, got);
    int64_t result =
        bend_result((struct bent_vfs *)base->vfs, offset, bytes, rc < 0 ? rc : (int64_t)*got);

    *got = result < 0 ? 0 : (size_t)result;
    return result < 0 ? (int)result : 0;
}

static int bent_read_result(struct vfs_file *base, void *buffer, size_t bytes, uint64_t offset,
                            int result)
{
    (void)buffer;
    return (int)bend_result((struct bent_vfs *)base->vfs, offset, bytes, result);
}

static void bent_init(struct bent_vfs *vfs, enum bend bend)
{
    memset(vfs, 0, sizeof *vfs);
    vfs->ops.open = bent_open;
    vfs->ops.close = bent_close;
    vfs->ops.pread = bent_pread;
    vfs->ops.read_result = bent_read_result;
    vfs->below = vfs_posix();
    vfs->bend = bend;
}

/* ---- fixtures ---- */

static const enum reader_backend uring = READER_URING;
static const enum reader_backend pread_pool = READER_PREAD;

static bool uring_allowed(void)
{
    char reason[256];

    return reader_probe(reason) == READER_URING;
}

static struct reader *open_reader(void **state, uint32_t depth)
{
    enum reader_backend backend = *(const enum reader_backend *)*state;
    struct reader *reader = NULL;
    struct error err = ERROR_INIT;

    if (backend == READER_URING && !uring_allowed())
        skip();
    if (reader_open(backend, depth, &reader, &err) < 0)
        fail_msg("%s", err.message);
    assert_int_equal(reader_backend_of(reader), backend);
    assert_int_equal(reader_depth(reader), depth);
    return reader;
}

static struct vfs_file *open_file(struct vfs *vfs, unsigned flags)
{
    struct vfs_file *file = NULL;

    assert_int_equal(vfs->open(vfs, path, flags, &file), 0);
    return file;
}

static void close_file(struct vfs_file *file)
{
    assert_int_equal(file->vfs->close(file), 0);
}

struct read_set {
    uint8_t *memory;
    struct reader_read *reads;
    struct reader_read **pointers;
    uint32_t count;
};

/* `count` reads of blocks_each blocks, one behind the other from offset 0. */
static struct read_set read_set_new(struct vfs_file *file, uint32_t count, uint32_t blocks_each)
{
    struct read_set set = {.count = count};
    uint32_t bytes = blocks_each * BLOCK;

    set.memory = file_buffer_alloc((size_t)count * bytes);
    set.reads = calloc(count, sizeof *set.reads);
    set.pointers = calloc(count, sizeof(struct reader_read *));
    assert_non_null(set.memory);
    assert_true(set.reads && set.pointers);
    memset(set.memory, 0xee, (size_t)count * bytes);
    for (uint32_t i = 0; i < count; i++) {
        set.reads[i].file = file;
        set.reads[i].offset = (uint64_t)i * bytes;
        set.reads[i].bytes = bytes;
        set.reads[i].buffer = set.memory + (size_t)i * bytes;
        set.reads[i].owner = &set.reads[i];
        set.reads[i].error = 12345; /* reader must reset all of its fields */
        set.reads[i].done_bytes = 77;
        set.reads[i].retries = 1000;
        set.pointers[i] = &set.reads[i];
    }
    return set;
}

static void read_set_release(struct read_set *set)
{
    free(set->memory);
    free(set->reads);
    free(set->pointers);
}

static void submit_all(struct reader *reader, struct read_set *set)
{
    struct error err = ERROR_INIT;

    if (reader_submit(reader, set->pointers, set->count, &err) < 0)
        fail_msg("%s", err.message);
}

/* Waits until nothing is in flight; each read must come back once. */
static void wait_all(struct reader *reader, uint32_t count)
{
    struct reader_read *done[16];
    uint32_t seen = 0;

    assert_int_equal(reader_in_flight(reader), count);
    while (reader_in_flight(reader) > 0) {
        uint32_t got = reader_wait(reader, done, 16, true);

        assert_in_range(got, 1, 16);
        for (uint32_t i = 0; i < got; i++)
            assert_ptr_equal(done[i]->owner, done[i]);
        seen += got;
        assert_int_equal(reader_in_flight(reader), count - seen);
    }
    assert_int_equal(seen, count);
    assert_int_equal(reader_wait(reader, done, 16, true), 0);
}

static bool read_is_right(const struct reader_read *read)
{
    return read->error == 0 && memcmp(read->buffer, content + read->offset, read->bytes) == 0;
}

/* ---- both backends ---- */

static void random_batches(void **state, unsigned flags)
{
    enum { DEPTH = 48, TOTAL = 3000 };
    struct reader *reader = open_reader(state, DEPTH);
    struct vfs_file *file = open_file(vfs_posix(), flags);
    struct read_set set = read_set_new(file, DEPTH, READ_BLOCKS_MAX);
    struct reader_read *idle[DEPTH], *batch[DEPTH], *done[DEPTH];
    uint32_t idle_count = DEPTH, submitted = 0, finished = 0;
    struct random random;
    struct error err = ERROR_INIT;

    random_init(&random, 20240607, 1);
    memcpy(idle, set.pointers, sizeof idle);
    while (finished < TOTAL) {
        uint32_t count = (uint32_t)random_below(&random, idle_count + 1);
        uint32_t got;

        if (count > TOTAL - submitted)
            count = TOTAL - submitted;
        for (uint32_t i = 0; i < count; i++) {
            uint32_t blocks = 1 + (uint32_t)random_below(&random, READ_BLOCKS_MAX);

            batch[i] = idle[--idle_count];
            batch[i]->bytes = blocks * BLOCK;
            batch[i]->offset = random_below(&random, FILE_BLOCKS - blocks + 1) * BLOCK;
            memset(batch[i]->buffer, 0xee, batch[i]->bytes);
        }
        if (reader_submit(reader, batch, count, &err) < 0)
            fail_msg("seed 20240607: %s", err.message);
        submitted += count;
        got = reader_wait(reader, done, 1 + (uint32_t)random_below(&random, DEPTH),
                          random_below(&random, 2) == 0);
        for (uint32_t i = 0; i < got; i++) {
            if (!read_is_right(done[i]))
                fail_msg("seed 20240607: read %u of %u bytes at %llu: error %d or wrong bytes",
                         finished, done[i]->bytes, (unsigned long long)done[i]->offset,
                         done[i]->error);
            idle[idle_count++] = done[i];
            finished++;
        }
    }
    assert_int_equal(reader_in_flight(reader), 0);
    assert_int_equal(reader_uring_strays(reader), 0);
    reader_close(reader);
    close_file(file);
    read_set_release(&set);
}

static void test_random_direct_batches_bring_the_bytes_of_the_file(void **state)
{
    random_batches(state, VFS_READ | VFS_DIRECT);
}

static void test_random_cached_batches_bring_the_bytes_of_the_file(void **state)
{
    random_batches(state, VFS_READ);
}

static void test_a_wait_that_does_not_block_sees_everything_in_the_end(void **state)
{
    struct reader *reader = open_reader(state, 32);
    struct vfs_file *file = open_file(vfs_posix(), VFS_READ | VFS_DIRECT);
    struct read_set set = read_set_new(file, 32, 2);
    struct reader_read *done[3];
    uint32_t seen = 0;

    assert_int_equal(reader_wait(reader, done, 3, false), 0);
    assert_int_equal(reader_wait(reader, done, 3, true), 0);
    submit_all(reader, &set);
    assert_int_equal(reader_wait(reader, done, 0, true), 0);
    while (seen < 32) {
        uint32_t got = reader_wait(reader, done, 3, false);

        for (uint32_t i = 0; i < got; i++)
            assert_true(read_is_right(done[i]));
        seen += got;
    }
    assert_int_equal(reader_in_flight(reader), 0);
    reader_close(reader);
    close_file(file);
    read_set_release(&set);
}

static void test_short_reads_are_resumed(void **state)
{
    struct bent_vfs vfs;
    struct reader *reader = open_reader(state, 16);
    struct vfs_file *file;
    struct read_set set;

    bent_init(&vfs, BEND_SHORT);
    /* Few enough that all of them may hit one read without using up its retries. */
    atomic_store(&vfs.bend_count, READER_RETRIES_MAX);
    file = open_file(&vfs.ops, VFS_READ | VFS_DIRECT);
    set = read_set_new(file, 16, 8);
    submit_all(reader, &set);
    wait_all(reader, 16);
    for (uint32_t i = 0; i < 16; i++)
        assert_true(read_is_right(&set.reads[i]));
    assert_int_equal(atomic_load(&vfs.result_count), 16 + READER_RETRIES_MAX);
    reader_close(reader);
    close_file(file);
    read_set_release(&set);
}

static void test_interrupted_reads_are_tried_again(void **state)
{
    static const int errors[] = {EINTR, EAGAIN};

    for (size_t e = 0; e < 2; e++) {
        struct bent_vfs vfs;
        struct reader *reader = open_reader(state, 8);
        struct vfs_file *file;
        struct read_set set;

        bent_init(&vfs, BEND_INTERRUPT);
        vfs.bend_errno = errors[e];
        atomic_store(&vfs.bend_count, 12);
        file = open_file(&vfs.ops, VFS_READ | VFS_DIRECT);
        set = read_set_new(file, 8, 1);
        submit_all(reader, &set);
        wait_all(reader, 8);
        for (uint32_t i = 0; i < 8; i++)
            assert_true(read_is_right(&set.reads[i]));
        assert_int_equal(atomic_load(&vfs.result_count), 8 + 12);
        reader_close(reader);
        close_file(file);
        read_set_release(&set);
    }
}

static void test_trying_again_has_an_end(void **state)
{
    struct bent_vfs vfs;
    struct reader *reader = open_reader(state, 1);
    struct vfs_file *file;
    struct read_set set;

    bent_init(&vfs, BEND_INTERRUPT);
    vfs.bend_errno = EAGAIN;
    atomic_store(&vfs.bend_count, 1000000);
    file = open_file(&vfs.ops, VFS_READ | VFS_DIRECT);
    set = read_set_new(file, 1, 1);
    submit_all(reader, &set);
    wait_all(reader, 1);
    assert_int_equal(set.reads[0].error, EAGAIN);
    assert_int_equal(atomic_load(&vfs.result_count), 1 + READER_RETRIES_MAX);

    /* Bytes of a first block that never gets whole are no progress. */
    vfs.bend = BEND_TRICKLE;
    atomic_store(&vfs.result_count, 0);
    submit_all(reader, &set);
    wait_all(reader, 1);
    assert_int_equal(set.reads[0].error, EIO);
    assert_int_equal(atomic_load(&vfs.result_count), 1 + READER_RETRIES_MAX);
    reader_close(reader);
    close_file(file);
    read_set_release(&set);
}

static void test_an_error_comes_back_in_its_read_and_in_no_other(void **state)
{
    struct bent_vfs vfs;
    struct reader *reader = open_reader(state, 16);
    struct vfs_file *file;
    struct read_set set;

    bent_init(&vfs, BEND_ERROR);
    vfs.bend_offset = 5 * 2 * BLOCK + BLOCK;
    vfs.bend_errno = ENODATA; /* what a bad sector gives on some drivers */
    file = open_file(&vfs.ops, VFS_READ | VFS_DIRECT);
    set = read_set_new(file, 16, 2);
    submit_all(reader, &set);
    wait_all(reader, 16);
    for (uint32_t i = 0; i < 16; i++) {
        if (i == 5)
            assert_int_equal(set.reads[i].error, ENODATA);
        else
            assert_true(read_is_right(&set.reads[i]));
    }
    /* The read itself is as good as new. */
    vfs.bend = BEND_NONE;
    submit_all(reader, &set);
    wait_all(reader, 16);
    for (uint32_t i = 0; i < 16; i++)
        assert_true(read_is_right(&set.reads[i]));
    reader_close(reader);
    close_file(file);
    read_set_release(&set);
}

static void reads_past_the_end(void **state, unsigned flags)
{
    struct reader *reader = open_reader(state, 8);
    struct vfs_file *file = open_file(vfs_posix(), flags);
    struct read_set set = read_set_new(file, 5, 2);

    set.reads[0].offset = (uint64_t)(FILE_BLOCKS - 2) * BLOCK; /* the last whole blocks: fine */
    set.reads[1].offset = (uint64_t)(FILE_BLOCKS - 1) * BLOCK; /* into the tail */
    set.reads[2].offset = (uint64_t)FILE_BLOCKS * BLOCK;       /* the tail */
    set.reads[3].offset = (uint64_t)(FILE_BLOCKS + 100) * BLOCK;
    set.reads[4].offset = UINT64_MAX - BLOCK + 1; /* no file offset at all */
    submit_all(reader, &set);
    wait_all(reader, 5);
    assert_true(read_is_right(&set.reads[0]));
    assert_int_equal(set.reads[1].error, EIO);
    assert_int_equal(set.reads[2].error, EIO);
    assert_int_equal(set.reads[3].error, EIO);
    assert_int_not_equal(set.reads[4].error, 0);
    reader_close(reader);
    close_file(file);
    read_set_release(&set);
}

static void test_a_read_past_the_end_of_the_file_fails(void **state)
{
    reads_past_the_end(state, VFS_READ | VFS_DIRECT);
    reads_past_the_end(state, VFS_READ);
}

static void test_more_reads_than_the_depth_are_refused_and_none_is_taken(void **state)
{
    struct reader *reader = open_reader(state, 5); /* not a power of two: rings round up */
    struct vfs_file *file = open_file(vfs_posix(), VFS_READ | VFS_DIRECT);
    struct read_set set = read_set_new(file, 6, 1);
    struct error err = ERROR_INIT;

    assert_int_equal(reader_submit(reader, set.pointers, 6, &err), -1);
    assert_int_equal(err.code, ERR_INVALID);
    assert_int_equal(reader_in_flight(reader), 0);
    error_clear(&err);
    assert_int_equal(reader_submit(reader, set.pointers, 4, &err), 0);
    assert_int_equal(reader_submit(reader, set.pointers + 4, 2, &err), -1);
    assert_int_equal(err.code, ERR_INVALID);
    assert_int_equal(reader_in_flight(reader), 4);
    error_clear(&err);
    assert_int_equal(reader_submit(reader, set.pointers + 4, 1, &err), 0);
    wait_all(reader, 5);
    for (uint32_t i = 0; i < 5; i++)
        assert_true(read_is_right(&set.reads[i]));
    reader_close(reader);
    close_file(file);
    read_set_release(&set);
}

static void test_unaligned_and_empty_reads_are_refused(void **state)
{
    struct reader *reader = open_reader(state, 4);
    struct vfs_file *file = open_file(vfs_posix(), VFS_READ | VFS_DIRECT);
    struct read_set set = read_set_new(file, 4, 2);

    set.reads[0].offset = 512;
    set.reads[1].bytes = BLOCK + 1;
    set.reads[2].buffer += 8;
    set.reads[3].bytes = 0;
    for (uint32_t i = 0; i < 4; i++) {
        struct error err = ERROR_INIT;

        assert_int_equal(reader_submit(reader, set.pointers + i, 1, &err), -1);
        assert_int_equal(err.code, ERR_INVALID);
        assert_int_equal(reader_in_flight(reader), 0);
    }
    reader_close(reader);
    close_file(file);
    read_set_release(&set);
}

static void test_close_waits_for_what_is_in_flight(void **state)
{
    for (uint32_t round = 0; round < 20; round++) {
        struct reader *reader = open_reader(state, 64);
        struct vfs_file *file = open_file(vfs_posix(), VFS_READ | VFS_DIRECT);
        struct read_set set = read_set_new(file, 64, 8);

        submit_all(reader, &set);
        reader_close(reader);
        for (uint32_t i = 0; i < 64; i++)
            assert_true(read_is_right(&set.reads[i]));
        close_file(file);
        read_set_release(&set);
    }
    reader_close(NULL);
}

static void test_a_file_without_a_descriptor_is_read_through_its_vfs(void **state)
{
    struct bent_vfs vfs;
    struct reader *reader = open_reader(state, 8);
    struct vfs_file *hidden, *open;
    struct read_set set;

    bent_init(&vfs, BEND_SHORT);
    vfs.hide_descriptor = true;
    atomic_store(&vfs.bend_count, 3);
    hidden = open_file(&vfs.ops, VFS_READ | VFS_DIRECT);
    open = open_file(vfs_posix(), VFS_READ | VFS_DIRECT);
    set = read_set_new(hidden, 8, 4);
    for (uint32_t i = 0; i < 8; i += 2)
        set.reads[i].file = open;
    submit_all(reader, &set);
    wait_all(reader, 8);
    for (uint32_t i = 0; i < 8; i++)
        assert_true(read_is_right(&set.reads[i]));
    assert_int_equal(atomic_load(&vfs.result_count), 4 + 3);
    reader_close(reader);
    close_file(open);
    close_file(hidden);
    read_set_release(&set);
}

struct crowd {
    enum reader_backend backend;
    uint64_t stream;
    uint32_t wrong_count;
};

static void *crowd_member(void *argument)
{
    struct crowd *crowd = argument;
    struct reader *reader = NULL;
    struct vfs_file *file = NULL;
    struct read_set set;
    struct random random;

    random_init(&random, 7, crowd->stream);
    crowd->wrong_count = 1;
    if (vfs_posix()->open(vfs_posix(), path, VFS_READ | VFS_DIRECT, &file) < 0)
        return NULL;
    set = read_set_new(file, 16, 1);
    if (reader_open(crowd->backend, 16, &reader, NULL) == 0) {
        crowd->wrong_count = 0;
        for (uint32_t round = 0; round < 50; round++) {
            struct reader_read *done[16];

            for (uint32_t i = 0; i < 16; i++)
                set.reads[i].offset = random_below(&random, FILE_BLOCKS) * BLOCK;
            if (reader_submit(reader, set.pointers, 16, NULL) < 0)
                crowd->wrong_count++;
            while (reader_wait(reader, done, 16, true) > 0)
                ;
            for (uint32_t i = 0; i < 16; i++)
                crowd->wrong_count += !read_is_right(&set.reads[i]);
        }
    }
    reader_close(reader);
    file->vfs->close(file);
    read_set_release(&set);
    return NULL;
}

static void test_readers_of_several_threads_do_not_meet(void **state)
{
    struct crowd crowd[4];
    pthread_t threads[4];

    reader_close(open_reader(state, 1)); /* skips where there is no io_uring */
    for (uint32_t i = 0; i < 4; i++) {
        crowd[i] = (struct crowd){.backend = *(const enum reader_backend *)*state, .stream = i};
        assert_int_equal(pthread_create(&threads[i], NULL, crowd_member, &crowd[i]), 0);
    }
    for (uint32_t i = 0; i < 4; i++) {
        pthread_join(threads[i], NULL);
        assert_int_equal(crowd[i].wrong_count, 0);
    }
}

/* ---- opening, parsing ---- */

static void test_depths_out_of_range_are_refused(void **state)
{
    static const uint32_t depths[] = {0, READER_DEPTH_MAX + 1, UINT32_MAX};

    (void)state;
    for (size_t i = 0; i < 3; i++) {
        struct reader *reader = NULL;
        struct error err = ERROR_INIT;

        assert_int_equal(reader_open(READER_PREAD, depths[i], &reader, &err), -1);
        assert_int_equal(err.code, ERR_INVALID);
        assert_null(reader);
    }
}

static void test_the_greatest_depth_works(void **state)
{
    struct reader *reader = open_reader(state, READER_DEPTH_MAX);
    struct vfs_file *file = open_file(vfs_posix(), VFS_READ | VFS_DIRECT);
    struct read_set set = read_set_new(file, READER_DEPTH_MAX, 1);

    for (uint32_t i = 0; i < READER_DEPTH_MAX; i++)
        set.reads[i].offset %= FILE_BLOCKS * BLOCK;
    submit_all(reader, &set);
    wait_all(reader, READER_DEPTH_MAX);
    for (uint32_t i = 0; i < READER_DEPTH_MAX; i++)
        assert_true(read_is_right(&set.reads[i]));
    reader_close(reader);
    close_file(file);
    read_set_release(&set);
}

static void test_backend_names_parse_and_others_name_the_choices(void **state)
{
    static const enum reader_backend all[] = {READER_AUTO, READER_URING, READER_PREAD};
    enum reader_backend backend;
    struct error err = ERROR_INIT;

    (void)state;
    for (size_t i = 0; i < 3; i++) {
        assert_int_equal(reader_backend_parse(reader_backend_name(all[i]), &backend, &err), 0);
        assert_int_equal(backend, all[i]);
    }
    assert_int_equal(reader_backend_parse("aio", &backend, &err), -1);
    assert_int_equal(err.code, ERR_INVALID);
    assert_non_null(strstr(err.message, "auto, uring or pread"));
}

static void test_auto_is_what_the_probe_says_and_the_probe_says_it_again(void **state)
{
    char first[256], second[256];
    enum reader_backend backend = reader_probe(first);
    struct reader *reader = NULL;
    struct error err = ERROR_INIT;

    (void)state;
    print_message("probe: %s %s\n", reader_backend_name(backend), first);
    assert_int_equal(reader_probe(second), backend);
    assert_string_equal(first, second);
    assert_int_equal(backend == READER_URING, first[0] == '\0');
    assert_int_equal(reader_open(READER_AUTO, 4, &reader, &err), 0);
    assert_int_equal(reader_backend_of(reader), backend);
    reader_close(reader);
}

/* ---- seccomp: each case in a child, since a filter cannot be taken off ---- */

static void forbid(uint32_t call, uint32_t action)
{
    struct sock_filter code[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, call, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, action),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog program = {.len = sizeof code / sizeof code[0], .filter = code};

    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0 ||
        prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) < 0)
        _exit(99);
}

/* Runs check() in a child; it returns 0 when all is well, else the line it failed at. */
static void in_child(int (*check)(void))
{
    int status = 0;
    pid_t child = fork();

    assert_true(child >= 0);
    if (child == 0) {
        int line = check();

        if (line > 0)
            fprintf(stderr, "check failed at line %d\n", line);
        _exit(line > 0);
    }
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_true(WIFEXITED(status));
    if (WEXITSTATUS(status) == 99)
        skip(); /* this machine does not let us set filters */
    assert_int_equal(WEXITSTATUS(status), 0);
}

#define CHECK(condition)                                                                           \
    do {                                                                                           \
        if (!(condition))                                                                          \
            return __LINE__;                                                                       \
    } while (0)

/* One batch through the reader, whatever its backend: 0 or a line number. */
static int check_reads(struct reader *reader, bool submitted, struct read_set *set)
{
    struct reader_read *done[64];
    uint32_t seen = 0, got;

    if (!submitted)
        CHECK(reader_submit(reader, set->pointers, set->count, NULL) == 0);
    while ((got = reader_wait(reader, done, 64, true)) > 0)
        seen += got;
    CHECK(seen == set->count);
    for (uint32_t i = 0; i < set->count; i++)
        CHECK(read_is_right(&set->reads[i]));
    return 0;
}

static int check_fallback_without_setup(uint32_t action, const char *wanted_reason)
{
    char reason[256];
    struct reader *reader = NULL;
    struct error err = ERROR_INIT;
    struct vfs_file *file = open_file(vfs_posix(), VFS_READ | VFS_DIRECT);
    struct read_set set = read_set_new(file, 8, 2);
    int line;

    forbid(NR_IO_URING_SETUP, action);
    CHECK(reader_probe_now(reason) == READER_PREAD);
    fprintf(stderr, "  reason: %s\n", reason);
    CHECK(strstr(reason, wanted_reason));
    if (action == SECCOMP_RET_KILL_PROCESS)
        return 0; /* the next call would be our end; reader_open(AUTO) asks the probe first */
    CHECK(reader_open(READER_URING, 8, &reader, &err) < 0);
    CHECK(err.code == ERR_UNSUPPORTED);
    /* AUTO: the cached answer of the probe may still say io_uring, as when a limit is met. */
    CHECK(reader_open(READER_AUTO, 8, &reader, NULL) == 0);
    CHECK(reader_backend_of(reader) == READER_PREAD);
    line = check_reads(reader, false, &set);
    reader_close(reader);
    close_file(file);
    read_set_release(&set);
    return line;
}

static int check_setup_not_permitted(void)
{
    return check_fallback_without_setup(SECCOMP_RET_ERRNO | EPERM,
                                        "io_uring_setup: Operation not permitted");
}

static int check_setup_not_there(void)
{
    return check_fallback_without_setup(SECCOMP_RET_ERRNO | ENOSYS,
                                        "io_uring_setup: Function not implemented");
}

static int check_setup_kills(void)
{
    return check_fallback_without_setup(SECCOMP_RET_KILL_PROCESS, "signal 31");
}

static int check_enter_not_permitted(void)
{
    char reason[256];

    forbid(NR_IO_URING_ENTER, SECCOMP_RET_ERRNO | EPERM);
    CHECK(reader_probe_now(reason) == READER_PREAD);
    CHECK(strstr(reason, "io_uring_enter: Operation not permitted"));
    return 0;
}

static void test_a_kernel_that_forbids_io_uring_gets_the_pread_backend(void **state)
{
    (void)state;
    in_child(check_setup_not_permitted);
    in_child(check_setup_not_there);
    in_child(check_setup_kills);
    in_child(check_enter_not_permitted);
}

/* before: reads are in the kernel already when the filter comes. */
static int check_change_over(bool before)
{
    struct reader *reader = NULL;
    struct vfs_file *file = open_file(vfs_posix(), VFS_READ | VFS_DIRECT);
    struct read_set set = read_set_new(file, 40, 4);
    int line;

    CHECK(reader_open(READER_URING, 40, &reader, NULL) == 0);
    if (before)
        CHECK(reader_submit(reader, set.pointers, set.count, NULL) == 0);
    forbid(NR_IO_URING_ENTER, SECCOMP_RET_ERRNO | EPERM);
    line = check_reads(reader, before, &set);
    CHECK(line == 0);
    CHECK(reader_backend_of(reader) == READER_PREAD);
    memset(set.memory, 0, 40 * 4 * BLOCK);
    line = check_reads(reader, false, &set);
    reader_close(reader);
    close_file(file);
    read_set_release(&set);
    return line;
}

static int check_change_over_at_submit(void)
{
    return check_change_over(false);
}

static int check_change_over_at_wait(void)
{
    return check_change_over(true);
}

/* Polling must notice as well, and closing must not hang. */
static int check_change_over_while_polling(void)
{
    struct reader *reader = NULL;
    struct vfs_file *file = open_file(vfs_posix(), VFS_READ | VFS_DIRECT);
    struct read_set set = read_set_new(file, 40, 4);
    struct reader_read *done[40];
    uint32_t seen = 0;

    CHECK(reader_open(READER_URING, 40, &reader, NULL) == 0);
    CHECK(reader_submit(reader, set.pointers, 40, NULL) == 0);
    forbid(NR_IO_URING_ENTER, SECCOMP_RET_ERRNO | EPERM);
    while (seen < 20)
        seen += reader_wait(reader, done, 1, false);
    reader_close(reader);
    for (uint32_t i = 0; i < 40; i++)
        CHECK(read_is_right(&set.reads[i]));
    close_file(file);
    read_set_release(&set);
    return 0;
}

static void test_a_ring_that_is_forbidden_later_changes_over_to_pread(void **state)
{
    (void)state;
    if (!uring_allowed())
        skip();
    in_child(check_change_over_at_submit);
    in_child(check_change_over_at_wait);
    in_child(check_change_over_while_polling);
}

/* ---- main ---- */

static int group_setup(void **state)
{
    struct random random;
    struct error err = ERROR_INIT;
    char reason[256];

    (void)state;
    reader_probe(reason); /* before any thread */
    if (!mkdtemp(folder))
        return -1;
    snprintf(path, sizeof path, "%s/data", folder);
    content = malloc(FILE_BYTES);
    if (!content)
        return -1;
    random_init(&random, 1, 0);
    for (uint32_t i = 0; i < FILE_BYTES; i++)
        content[i] = (uint8_t)random_u64(&random);
    return file_publish(vfs_posix(), path, content, FILE_BYTES, &err);
}

static int group_teardown(void **state)
{
    struct error err = ERROR_INIT;

    (void)state;
    free(content);
    return file_remove_all(vfs_posix(), folder, &err);
}

#define ON_BOTH(test)                                                                              \
    {"io_uring: " #test, test, NULL, NULL, (void *)&uring},                                        \
    {                                                                                              \
        "pread: " #test, test, NULL, NULL, (void *)&pread_pool                                     \
    }

int main(void)
{
    const struct CMUnitTest tests[] = {
        ON_BOTH(test_random_direct_batches_bring_the_bytes_of_the_file),
        ON_BOTH(test_random_cached_batches_bring_the_bytes_of_the_file),
        ON_BOTH(test_a_wait_that_does_not_block_sees_everything_in_the_end),
        ON_BOTH(test_short_reads_are_resumed),
        ON_BOTH(test_interrupted_reads_are_tried_again),
        ON_BOTH(test_trying_again_has_an_end),
        ON_BOTH(test_an_error_comes_back_in_its_read_and_in_no_other),
        ON_BOTH(test_a_read_past_the_end_of_the_file_fails),
        ON_BOTH(test_more_reads_than_the_depth_are_refused_and_none_is_taken),
        ON_BOTH(test_unaligned_and_empty_reads_are_refused),
        ON_BOTH(test_close_waits_for_what_is_in_flight),
        ON_BOTH(test_a_file_without_a_descriptor_is_read_through_its_vfs),
        ON_BOTH(test_readers_of_several_threads_do_not_meet),
        ON_BOTH(test_the_greatest_depth_works),
        cmocka_unit_test(test_depths_out_of_range_are_refused),
        cmocka_unit_test(test_backend_names_parse_and_others_name_the_choices),
        cmocka_unit_test(test_auto_is_what_the_probe_says_and_the_probe_says_it_again),
        cmocka_unit_test(test_a_kernel_that_forbids_io_uring_gets_the_pread_backend),
        cmocka_unit_test(test_a_ring_that_is_forbidden_later_changes_over_to_pread),
    };

    return cmocka_run_group_tests_name("reader", tests, group_setup, group_teardown);
}
