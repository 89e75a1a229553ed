/* How it works: blocks have one size, so block b stands at b * BLOCK_BYTES whoever it belongs to;
 * a flush writes the buffers that are not full as blocks of their own. The table says of each
 * whose it is, how full, and its CRC-32C, seeded with its number. */
#include "index/edge_runs.h"

#include <inttypes.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "storage/base/bytes.h"
#include "storage/file.h"

#ifndef BLOCK_EDGES /* tests make it small */
#define BLOCK_EDGES 8192u
#endif
#define BLOCK_BYTES (BLOCK_EDGES * sizeof(struct edge))

/* What the table says of a block. */
struct block_entry {
    uint32_t range;
    uint32_t count;  /* edges */
    uint32_t crc32c; /* of them, seeded with the block's number */
    uint32_t check;  /* CRC-32C of the entry before this field */
};

struct edge_runs {
    struct vfs_file *file;
    struct vfs_file *table_file;
    char path[FILE_PATH_MAX];
    char table_path[FILE_PATH_MAX];
    uint32_t count; /* rows */
    uint32_t ranges;
    struct edge **buffers; /* BLOCK_EDGES each, allocated when first used */
    uint32_t *filled;
    struct block_entry *table; /* block_count of them */
    uint64_t block_count;
    uint64_t block_room;
    uint64_t table_written; /* entries of the table that are in its file */
};

static uint32_t ranges_of(uint64_t count)
{
    return (uint32_t)((count + EDGE_RUNS_RANGE - 1) / EDGE_RUNS_RANGE);
}

static int table_grow(struct edge_runs *runs, uint64_t wanted, struct error *err)
{
    uint64_t room = runs->block_room ? runs->block_room : 1024;
    struct block_entry *table;

    if (wanted <= runs->block_room)
        return 0;
    while (room < wanted)
        room *= 2;
    table = realloc(runs->table, room * sizeof *table);
    if (!table)
        return error_set(err, ERR_NOMEM, "no memory for a table of %" PRIu64 " blocks", room);
    runs->table = table;
    runs->block_room = room;
    return 0;
}

static struct vfs_file *open_or_make(struct vfs *vfs, const char *path, bool fresh,
                                     struct error *err)
{
    if (fresh && file_remove_all(vfs, path, err) < 0)
        return NULL;
    return file_open(vfs, path, fresh ? VFS_WRITE | VFS_CREATE : VFS_WRITE, err);
}

static int truncate_to(struct vfs_file *file, const char *path, uint64_t bytes, struct error *err)
{
    uint64_t found;
    int rc;

    if (file_size(file, path, &found, err) < 0)
        return -1;
    if (found < bytes)
        return error_set(err, ERR_CORRUPT, "%s has %" PRIu64 " bytes, %" PRIu64 " are wanted", path,
                         found, bytes);
    rc = file->vfs->truncate(file, bytes);
    if (rc < 0)
        return error_set_errno(err, rc, "cannot cut %s", path);
    return 0;
}

int edge_runs_open(struct vfs *vfs, const char *path, uint32_t count, uint64_t blocks,
                   struct edge_runs **out, struct error *err)
{
    struct edge_runs *runs = calloc(1, sizeof *runs);

    if (!runs)
        return error_set(err, ERR_NOMEM, "no memory for runs of edges");
    runs->count = count;
    runs->ranges = ranges_of(count);
    if (snprintf(runs->path, sizeof runs->path, "%s", path) >= (int)sizeof runs->path ||
        snprintf(runs->table_path, sizeof runs->table_path, "%s.table", path) >=
            (int)sizeof runs->table_path) {
        error_set(err, ERR_INVALID, "the path %s is too long", path);
        goto failed;
    }
    runs->buffers = calloc(runs->ranges, sizeof *runs->buffers);
    runs->filled = calloc(runs->ranges, sizeof *runs->filled);
    if (!runs->buffers || !runs->filled) {
        error_set(err, ERR_NOMEM, "no memory for runs of %" PRIu32 " ranges", runs->ranges);
        goto failed;
    }
    runs->file = open_or_make(vfs, runs->path, blocks == 0, err);
    if (!runs->file)
        goto failed;
    runs->table_file = open_or_make(vfs, runs->table_path, blocks == 0, err);
    if (!runs->table_file || truncate_to(runs->file, runs->path, blocks * BLOCK_BYTES, err) < 0 ||
        truncate_to(runs->table_file, runs->table_path, blocks * sizeof *runs->table, err) < 0 ||
        table_grow(runs, blocks, err) < 0)
        goto failed;
    if (blocks && file_read_exact(runs->table_file, runs->table_path, runs->table,
                                  blocks * sizeof *runs->table, 0, err) < 0)
        goto failed;
    for (uint64_t b = 0; b < blocks; b++) {
        const struct block_entry *entry = &runs->table[b];

        if (entry->range >= runs->ranges || entry->count > BLOCK_EDGES ||
            entry->check != crc32c((uint32_t)b, entry, offsetof(struct block_entry, check))) {
            error_set(err, ERR_CORRUPT, "%s: entry %" PRIu64 " is damaged", runs->table_path, b);
            goto failed;
        }
    }
    runs->block_count = blocks;
    runs->table_written = blocks;
    *out = runs;
    return 0;
failed:
    edge_runs_close(runs);
    return -1;
}

void edge_runs_close(struct edge_runs *runs)
{
    if (!runs)
        return;
    for (uint32_t i = 0; runs->buffers && i < runs->ranges; i++)
        free(runs->buffers[i]);
    free(runs->buffers);
    free(runs->filled);
    free(runs->table);
    file_close(runs->file, runs->path, NULL);
    file_close(runs->table_file, runs->table_path, NULL);
    free(runs);
}

static int write_block(struct edge_runs *runs, uint32_t range, struct error *err)
{
    struct block_entry *entry;

    if (table_grow(runs, runs->block_count + 1, err) < 0 ||
        file_write_full(runs->file, runs->path, runs->buffers[range],
                        runs->filled[range] * sizeof(struct edge), runs->block_count * BLOCK_BYTES,
                        err) < 0)
        return -1;
    entry = &runs->table[runs->block_count];
    entry->range = range;
    entry->count = runs->filled[range];
    entry->crc32c = crc32c((uint32_t)runs->block_count, runs->buffers[range],
                           entry->count * sizeof(struct edge));
    entry->check = crc32c((uint32_t)runs->block_count, entry, offsetof(struct block_entry, check));
    runs->block_count++;
    runs->filled[range] = 0;
    return 0;
}

int edge_runs_add(struct edge_runs *runs, uint32_t to, uint32_t from, struct error *err)
{
    uint32_t range = to / EDGE_RUNS_RANGE;

    if (!runs->buffers[range]) {
        runs->buffers[range] = malloc(BLOCK_BYTES);
        if (!runs->buffers[range])
            return error_set(err, ERR_NOMEM, "no memory for a block of edges");
    }
    runs->buffers[range][runs->filled[range]++] = (struct edge){to, from};
    return runs->filled[range] == BLOCK_EDGES ? write_block(runs, range, err) : 0;
}

int edge_runs_flush(struct edge_runs *runs, uint64_t *blocks, struct error *err)
{
    int rc;

    for (uint32_t range = 0; range < runs->ranges; range++)
        if (runs->filled[range] && write_block(runs, range, err) < 0)
            return -1;
    /* The last block may be short: the file is as long as its blocks say. */
    rc = runs->file->vfs->truncate(runs->file, runs->block_count * BLOCK_BYTES);
    if (rc < 0)
        return error_set_errno(err, rc, "cannot extend %s", runs->path);
    if (file_write_full(runs->table_file, runs->table_path, runs->table + runs->table_written,
                        (runs->block_count - runs->table_written) * sizeof *runs->table,
                        runs->table_written * sizeof *runs->table, err) < 0 ||
        file_sync(runs->file, runs->path, err) < 0 ||
        file_sync(runs->table_file, runs->table_path, err) < 0)
        return -1;
    runs->table_written = runs->block_count;
    *blocks = runs->block_count;
    return 0;
}

uint32_t edge_runs_range_count(const struct edge_runs *runs)
{
    return runs->ranges;
}

int edge_runs_read(const struct edge_runs *runs, uint32_t range, edge_runs_fn each, void *context,
                   struct error *err)
{
    struct edge *block = malloc(BLOCK_BYTES);
    int rc = -1;

    if (!block)
        return error_set(err, ERR_NOMEM, "no memory for a block of edges");
    for (uint64_t b = 0; b < runs->block_count; b++) {
        uint32_t count = runs->table[b].count;

        if (runs->table[b].range != range)
            continue;
        if (file_read_exact(runs->file, runs->path, block, count * sizeof *block, b * BLOCK_BYTES,
                            err) < 0)
            goto done;
        if (runs->table[b].crc32c != crc32c((uint32_t)b, block, count * sizeof *block)) {
            error_set(err, ERR_CORRUPT, "%s: block %" PRIu64 " fails its checksum", runs->path, b);
            goto done;
        }
        for (uint32_t i = 0; i < count; i++) {
            if (block[i].to / EDGE_RUNS_RANGE != range || block[i].to >= runs->count ||
                block[i].from >= runs->count || block[i].from == block[i].to) {
                error_set(err, ERR_CORRUPT,
                          "%s: block %" PRIu64 " holds an edge of another range, or of no row",
                          runs->path, b);
                goto done;
            }
        }
        each(context, block, count);
    }
    rc = 0;
done:
    free(block);
    return rc;
}

uint64_t edge_runs_memory_bytes(uint64_t count)
{
    /* A table entry for every BLOCK_EDGES of at most 64 edges a row or so, rounded up. */
    return (uint64_t)ranges_of(count) * (BLOCK_BYTES + 16) + count / 8 + BLOCK_BYTES;
}
