/* Fuzz target of index/graph_file.c. The first byte says whether the rest is a file as it stands,
 * or the header's numbers and the stream behind it: then blocks, length and checksums are made
 * right around them, since the writer of a file may be hostile and a fuzzer never guesses a CRC.
 * What is read must be walkable, and is written again: the same bytes. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "index/graph_file.h"
#include "storage/base/bytes.h"
#include "storage/vfs.h"

/* As in graph_file.c. */
#define BLOCK 4096u
#define PAYLOAD 4092u
#define CRC_AT 12u
#define BYTES_AT 16u
#define KEY_AT 48u
#define NUMBERS_AT 24u
#define NUMBERS_BYTES 20u /* edges, rows, degree, entry point */

struct memory_vfs {
    struct vfs vfs;
    struct vfs_file file;
    uint8_t *data;
    size_t bytes;
    size_t room;
};

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);

static void require(int ok, const char *what)
{
    if (!ok) {
        fprintf(stderr, "%s\n", what);
        abort();
    }
}

static int memory_open(struct vfs *vfs, const char *path, unsigned flags, struct vfs_file **out)
{
    struct memory_vfs *memory = (struct memory_vfs *)vfs;

    (void)path;
    (void)flags;
    memory->file = (struct vfs_file){vfs, -1};
    *out = &memory->file;
    return 0;
}

static int memory_close(struct vfs_file *file)
{
    (void)file;
    return 0;
}

static int memory_pread(struct vfs_file *file, void *buffer, size_t bytes, uint64_t offset,
                        size_t *got)
{
    struct memory_vfs *memory = (struct memory_vfs *)file->vfs;

    *got = 0;
    if (offset >= memory->bytes)
        return 0;
    *got = memory->bytes - offset < bytes ? memory->bytes - offset : bytes;
    memcpy(buffer, memory->data + offset, *got);
    return 0;
}

static int memory_pwrite(struct vfs_file *file, const void *buffer, size_t bytes, uint64_t offset,
                         size_t *put)
{
    struct memory_vfs *memory = (struct memory_vfs *)file->vfs;

    require(offset + bytes <= memory->room, "writes more than was read");
    memcpy(memory->data + offset, buffer, bytes);
    if (memory->bytes < offset + bytes)
        memory->bytes = offset + bytes;
    *put = bytes;
    return 0;
}

static int memory_size(struct vfs_file *file, uint64_t *bytes)
{
    *bytes = ((struct memory_vfs *)file->vfs)->bytes;
    return 0;
}

static int memory_sync(struct vfs_file *file, bool data_only)
{
    (void)file;
    (void)data_only;
    return 0;
}

static int memory_rename(struct vfs *vfs, const char *from, const char *to)
{
    (void)vfs;
    (void)from;
    (void)to;
    return 0;
}

static int memory_path(struct vfs *vfs, const char *path)
{
    (void)vfs;
    (void)path;
    return 0;
}

static const struct vfs memory_calls = {
    .open = memory_open,
    .close = memory_close,
    .pread = memory_pread,
    .pwrite = memory_pwrite,
    .size = memory_size,
    .sync = memory_sync,
    .rename = memory_rename,
    .unlink = memory_path,
    .dirsync = memory_path,
};

/* The file around a header's numbers and a stream. */
static uint8_t *make_file(const uint8_t *data, size_t bytes, size_t *file_bytes)
{
    size_t stream_bytes = bytes - NUMBERS_BYTES;
    size_t blocks = (stream_bytes + PAYLOAD - 1) / PAYLOAD;
    uint8_t *file;

    *file_bytes = (1 + blocks) * BLOCK;
    file = calloc(1, *file_bytes);
    require(file != NULL, "no memory");
    memcpy(file, "ANNDGRPH", 8);
    store_u32(file + 8, 1);
    store_u64(file + BYTES_AT, *file_bytes);
    memcpy(file + NUMBERS_AT, data, NUMBERS_BYTES);
    store_u32(file + CRC_AT, crc32c(0, file, BLOCK));
    for (size_t i = 0; i < blocks; i++) {
        uint8_t *block = file + (1 + i) * BLOCK, number[8];
        size_t left = stream_bytes - i * PAYLOAD;
        uint32_t crc = crc32c(0, file + KEY_AT, DIGEST_BYTES);

        memcpy(block, data + NUMBERS_BYTES + i * PAYLOAD, left < PAYLOAD ? left : PAYLOAD);
        store_u64(number, 1 + i);
        crc = crc32c(crc32c(crc, number, sizeof number), block, PAYLOAD);
        store_u32(block + PAYLOAD, crc);
    }
    return file;
}

static void use(const struct graph *graph)
{
    uint64_t sum = 0;

    require(graph->entry_point < graph->count, "no entry point");
    for (uint32_t row = 0; row < graph->count; row++) {
        require(graph->degrees[row] <= graph->max_degree, "too many neighbours");
        for (uint32_t i = 0; i < graph->degrees[row]; i++)
            sum += graph->degrees[graph->neighbours[(size_t)row * graph->max_degree + i]];
    }
    require(sum <= (uint64_t)graph->count * graph->max_degree * graph->max_degree, "wrong degrees");
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    struct memory_vfs memory = {.vfs = memory_calls}, again = {.vfs = memory_calls};
    uint8_t key[DIGEST_BYTES] = {0};
    struct error err = ERROR_INIT;
    struct graph *graph = NULL;

    if (bytes < 1 + NUMBERS_BYTES)
        return 0;
    if (data[0] & 1) {
        memory.data = malloc(bytes - 1);
        require(memory.data != NULL, "no memory");
        memory.bytes = bytes - 1;
        memcpy(memory.data, data + 1, memory.bytes);
        if (memory.bytes >= KEY_AT + DIGEST_BYTES)
            memcpy(key, memory.data + KEY_AT, DIGEST_BYTES);
    } else {
        memory.data = make_file(data + 1, bytes - 1, &memory.bytes);
    }
    if (graph_file_read(&memory.vfs, "fuzz", key, &graph, &err) == 0) {
        use(graph);
        again.room = memory.bytes;
        again.data = malloc(again.room);
        require(again.data != NULL, "no memory");
        require(graph_file_write(&again.vfs, "again", graph, key, &err) == 0, "cannot be written");
        require(again.bytes == memory.bytes && !memcmp(again.data, memory.data, again.bytes),
                "is written differently");
    } else {
        require(graph == NULL && (err.code == ERR_CORRUPT || err.code == ERR_UNSUPPORTED ||
                                  err.code == ERR_NOMEM),
                "another error");
    }
    graph_free(graph);
    free(again.data);
    free(memory.data);
    return 0;
}
