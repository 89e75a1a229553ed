/* How it works: a header block, then a stream of numbers cut into blocks, each with its CRC-32C:
 * all degrees as u16, then the neighbours of row 0, row 1, ... as u32, then zeros up to the end of
 * the last block. A block's CRC starts from the key and the block's number, so that blocks of
 * another graph, or in another place, do not pass. Blocks are moved in runs of 1 MiB: the file is
 * never in memory whole beside the graph. */
#include "index/graph_file.h"

#include <assert.h>
#include <inttypes.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "storage/base/bytes.h"
#include "storage/file.h"

#define MAGIC "ANNDGRPH"
#define VERSION 1u
#define BLOCK_BYTES FILE_BLOCK_BYTES
#define PAYLOAD_BYTES (BLOCK_BYTES - 4) /* of a block; its CRC-32C follows */
#define RUN_BLOCKS 256u
#define DEGREES_AT_ONCE 2048u

/* The rest of the first block is zero. */
struct graph_file_header {
    char magic[8];             /* 00-07 "ANNDGRPH" */
    uint32_t version;          /* 08-11 */
    uint32_t crc32c;           /* 12-15 of the whole block, this field as zero */
    uint64_t file_bytes;       /* 16-23 */
    uint64_t edge_count;       /* 24-31 sum of the degrees */
    uint32_t count;            /* 32-35 rows */
    uint32_t max_degree;       /* 36-39 1..GRAPH_FILE_DEGREE_MAX */
    uint32_t entry_point;      /* 40-43 a row */
    uint32_t reserved;         /* 44-47 zero */
    uint8_t key[DIGEST_BYTES]; /* 48-79 what the graph was made of */
};
static_assert(sizeof(struct graph_file_header) == 80, "on-disk layout");

/* The stream behind the header, on its way in or out. */
struct stream {
    struct vfs_file *file;
    const char *path;
    uint8_t *run; /* RUN_BLOCKS blocks */
    uint32_t seed;
    uint64_t block_count; /* of the file, the header's included */
    uint64_t block;       /* the one that `at` stands in */
    uint32_t at;          /* bytes of its payload that are done */
};

/* Of a file with these counts; false if there can be none. */
static bool file_blocks(uint64_t count, uint64_t edge_count, uint64_t *blocks)
{
    uint64_t edge_bytes, bytes;

    if (!size_mul(edge_count, sizeof(uint32_t), &edge_bytes) ||
        !size_add(count * sizeof(uint16_t), edge_bytes, &bytes) || bytes > INT64_MAX / 2)
        return false;
    *blocks = 1 + (bytes + PAYLOAD_BYTES - 1) / PAYLOAD_BYTES;
    return true;
}

static uint32_t block_crc(const struct stream *stream, uint64_t block, const uint8_t *data)
{
    uint8_t number[8];

    store_u64(number, block);
    return crc32c(crc32c(stream->seed, number, sizeof number), data, PAYLOAD_BYTES);
}

static uint8_t *block_data(const struct stream *stream, uint64_t block)
{
    return stream->run + (block - 1) % RUN_BLOCKS * BLOCK_BYTES;
}

static int stream_init(struct stream *stream, struct vfs_file *file, const char *path,
                       const uint8_t key[DIGEST_BYTES], uint64_t block_count, struct error *err)
{
    *stream = (struct stream){.file = file, .path = path, .block_count = block_count, .block = 1};
    stream->seed = crc32c(0, key, DIGEST_BYTES);
    stream->run = file_buffer_alloc((size_t)RUN_BLOCKS * BLOCK_BYTES);
    if (!stream->run)
        return error_set(err, ERR_NOMEM, "%s: no memory for a buffer of %u bytes", path,
                         RUN_BLOCKS * BLOCK_BYTES);
    return 0;
}

/* ---- the graph's own rules ---- */

/* marks[count]: row + 1 of the last list that named a row. False if the list cannot be. */
static bool list_is_valid(const struct graph *graph, uint32_t row, uint32_t *marks)
{
    const uint32_t *neighbours = graph->neighbours + (uint64_t)row * graph->max_degree;

    for (uint32_t i = 0; i < graph->degrees[row]; i++) {
        uint32_t to = neighbours[i];

        if (to >= graph->count || to == row || marks[to] == row + 1)
            return false;
        marks[to] = row + 1;
    }
    return true;
}

static int check_graph(const char *path, const struct graph *graph, uint64_t *edge_count,
                       struct error *err)
{
    uint32_t *marks = NULL;
    int rc = -1;

    *edge_count = 0;
    if (graph->count == 0 || graph->count == UINT32_MAX || graph->max_degree == 0 ||
        graph->max_degree > GRAPH_FILE_DEGREE_MAX || graph->entry_point >= graph->count)
        return error_set(err, ERR_INVALID,
                         "%s: a graph of %u rows, degree %u, entry point %u cannot be kept", path,
                         graph->count, graph->max_degree, graph->entry_point);
    marks = calloc(graph->count, sizeof *marks);
    if (!marks)
        return error_set(err, ERR_NOMEM, "%s: no memory to check %u rows", path, graph->count);
    for (uint32_t row = 0; row < graph->count; row++) {
        if (graph->degrees[row] > graph->max_degree || !list_is_valid(graph, row, marks)) {
            error_set(err, ERR_INVALID,
                      "%s: the neighbours of row %u are not %u other rows at most, each once", path,
                      row, graph->max_degree);
            goto done;
        }
        *edge_count += graph->degrees[row];
    }
    rc = 0;
done:
    free(marks);
    return rc;
}

/* ---- writing ---- */

/* Writes out the blocks of the run up to `block`, which is full. */
static int flush_run(struct stream *stream, uint64_t block, struct error *err)
{
    uint64_t first = (block - 1) / RUN_BLOCKS * RUN_BLOCKS + 1;

    return file_write_full(stream->file, stream->path, stream->run,
                           (size_t)(block - first + 1) * BLOCK_BYTES, first * BLOCK_BYTES, err);
}

static int end_block(struct stream *stream, struct error *err)
{
    uint8_t *data = block_data(stream, stream->block);
    uint64_t block = stream->block++;

    store_u32(data + PAYLOAD_BYTES, block_crc(stream, block, data));
    stream->at = 0;
    return block % RUN_BLOCKS == 0 ? flush_run(stream, block, err) : 0;
}

static int stream_put(struct stream *stream, const void *data, size_t bytes, struct error *err)
{
    const uint8_t *from = data;

    while (bytes > 0) {
        size_t room = PAYLOAD_BYTES - stream->at;
        size_t part = bytes < room ? bytes : room;

        memcpy(block_data(stream, stream->block) + stream->at, from, part);
        stream->at += (uint32_t)part;
        from += part;
        bytes -= part;
        if (stream->at == PAYLOAD_BYTES && end_block(stream, err) < 0)
            return -1;
    }
    return 0;
}

static int stream_finish(struct stream *stream, struct error *err)
{
    if (stream->at > 0) {
        memset(block_data(stream, stream->block) + stream->at, 0, PAYLOAD_BYTES - stream->at);
        if (end_block(stream, err) < 0)
            return -1;
    }
    if ((stream->block - 1) % RUN_BLOCKS == 0)
        return 0;
    return flush_run(stream, stream->block - 1, err);
}

static int put_graph(struct stream *stream, const struct graph *graph, struct error *err)
{
    uint16_t degrees[DEGREES_AT_ONCE];
    uint32_t count = 0;

    for (uint32_t row = 0; row < graph->count; row++) {
        store_u16(&degrees[count++], (uint16_t)graph->degrees[row]);
        if (count < DEGREES_AT_ONCE && row + 1 < graph->count)
            continue;
        if (stream_put(stream, degrees, count * sizeof *degrees, err) < 0)
            return -1;
        count = 0;
    }
    for (uint32_t row = 0; row < graph->count; row++) {
        const uint32_t *neighbours = graph->neighbours + (uint64_t)row * graph->max_degree;

        if (stream_put(stream, neighbours, graph->degrees[row] * sizeof *neighbours, err) < 0)
            return -1;
    }
    return stream_finish(stream, err);
}

static int put_header(struct stream *stream, const struct graph *graph, uint64_t edge_count,
                      const uint8_t key[DIGEST_BYTES], struct error *err)
{
    struct graph_file_header header = {
        .magic = MAGIC,
        .version = VERSION,
        .file_bytes = stream->block_count * BLOCK_BYTES,
        .edge_count = edge_count,
        .count = graph->count,
        .max_degree = graph->max_degree,
        .entry_point = graph->entry_point,
    };
    uint8_t *block = stream->run;

    memcpy(header.key, key, DIGEST_BYTES);
    memset(block, 0, BLOCK_BYTES);
    memcpy(block, &header, sizeof header);
    store_u32(block + offsetof(struct graph_file_header, crc32c), crc32c(0, block, BLOCK_BYTES));
    return file_write_full(stream->file, stream->path, block, BLOCK_BYTES, 0, err);
}

int graph_file_write(struct vfs *vfs, const char *path, const struct graph *graph,
                     const uint8_t key[DIGEST_BYTES], struct error *err)
{
    char aside[FILE_PATH_MAX], folder[FILE_PATH_MAX];
    struct stream stream = {0};
    struct vfs_file *file = NULL;
    bool created = false;
    uint64_t edge_count, blocks;
    int called, rc = -1;

    called = snprintf(aside, sizeof aside, "%s.tmp", path);
    if (called < 0 || (size_t)called >= sizeof aside)
        return error_set(err, ERR_INVALID, "the path is longer than %u bytes: %.100s...",
                         FILE_PATH_MAX - 1, path);
    file_path_folder(folder, path);
    if (check_graph(path, graph, &edge_count, err) < 0)
        goto done;
    if (!file_blocks(graph->count, edge_count, &blocks)) {
        error_set(err, ERR_INVALID, "%s: no file holds %" PRIu64 " edges", path, edge_count);
        goto done;
    }
    if (file_remove_all(vfs, aside, err) < 0)
        goto done;
    file = file_open(vfs, aside, VFS_WRITE | VFS_CREATE, err);
    if (!file)
        goto done;
    created = true;
    /* The header goes last: a file that was not finished has none. */
    if (stream_init(&stream, file, aside, key, blocks, err) < 0 ||
        put_graph(&stream, graph, err) < 0)
        goto done;
    assert(stream.block == blocks);
    if (put_header(&stream, graph, edge_count, key, err) < 0 || file_sync(file, aside, err) < 0)
        goto done;
    called = file_close(file, aside, err);
    file = NULL;
    if (called < 0 || file_rename(vfs, aside, path, err) < 0)
        goto done;
    created = false;
    rc = file_dirsync(vfs, folder, err);
done:
    file_close(file, aside, NULL);
    if (created)
        vfs->unlink(vfs, aside); /* a leftover does no harm */
    free(stream.run);
    return rc;
}

/* ---- reading ---- */

/* Reads the run that begins with `block` and checks it. */
static int load_run(struct stream *stream, uint64_t block, struct error *err)
{
    uint64_t left = stream->block_count - block;
    uint64_t blocks = left < RUN_BLOCKS ? left : RUN_BLOCKS;

    if (file_read_exact(stream->file, stream->path, stream->run, (size_t)blocks * BLOCK_BYTES,
                        block * BLOCK_BYTES, err) < 0)
        return -1;
    for (uint64_t i = block; i < block + blocks; i++) {
        const uint8_t *data = block_data(stream, i);
        uint32_t wanted = load_u32(data + PAYLOAD_BYTES), found = block_crc(stream, i, data);

        if (wanted != found)
            return error_set(err, ERR_CORRUPT,
                             "%s: the block at offset %" PRIu64
                             " is damaged: its CRC-32C is %08x, stored is %08x",
                             stream->path, i * BLOCK_BYTES, found, wanted);
    }
    return 0;
}

static uint64_t stream_offset(const struct stream *stream)
{
    return stream->block * BLOCK_BYTES + stream->at;
}

/* The caller asks for no more than the blocks hold. */
static int stream_get(struct stream *stream, void *out, size_t bytes, struct error *err)
{
    uint8_t *to = out;

    while (bytes > 0) {
        size_t left, part;

        assert(stream->block < stream->block_count);
        if (stream->at == 0 && (stream->block - 1) % RUN_BLOCKS == 0 &&
            load_run(stream, stream->block, err) < 0)
            return -1;
        left = PAYLOAD_BYTES - stream->at;
        part = bytes < left ? bytes : left;
        memcpy(to, block_data(stream, stream->block) + stream->at, part);
        stream->at += (uint32_t)part;
        to += part;
        bytes -= part;
        if (stream->at == PAYLOAD_BYTES) {
            stream->at = 0;
            stream->block++;
        }
    }
    return 0;
}

static int check_header(const char *path, const uint8_t *block,
                        const struct graph_file_header *header, struct error *err)
{
    uint8_t copy[BLOCK_BYTES];
    uint32_t found;
    uint64_t blocks;

    if (memcmp(header->magic, MAGIC, sizeof header->magic) != 0)
        return error_set(err, ERR_CORRUPT, "%s: does not begin like a graph file, at offset 0",
                         path);
    memcpy(copy, block, sizeof copy);
    store_u32(copy + offsetof(struct graph_file_header, crc32c), 0);
    found = crc32c(0, copy, sizeof copy);
    if (found != header->crc32c)
        return error_set(err, ERR_CORRUPT,
                         "%s: the header at offset 0 is damaged: its CRC-32C is %08x, stored is "
                         "%08x",
                         path, found, header->crc32c);
    if (header->version != VERSION)
        return error_set(err, ERR_UNSUPPORTED, "%s: is of version %u, this program reads %u", path,
                         header->version, VERSION);
    for (size_t i = sizeof *header; i < BLOCK_BYTES; i++) {
        if (block[i] != 0)
            return error_set(err, ERR_CORRUPT, "%s: byte %zu of the header is %u instead of 0",
                             path, i, block[i]);
    }
    if (header->reserved != 0 || header->count == 0 || header->count == UINT32_MAX ||
        header->max_degree == 0 || header->max_degree > GRAPH_FILE_DEGREE_MAX ||
        header->entry_point >= header->count ||
        header->edge_count > (uint64_t)header->count * header->max_degree ||
        !file_blocks(header->count, header->edge_count, &blocks) ||
        header->file_bytes != blocks * BLOCK_BYTES)
        return error_set(err, ERR_CORRUPT,
                         "%s: the header at offset 0 contradicts itself: %u rows, %" PRIu64
                         " edges, degree %u, entry point %u, %" PRIu64 " bytes",
                         path, header->count, header->edge_count, header->max_degree,
                         header->entry_point, header->file_bytes);
    return 0;
}

static int check_key(const char *path, const uint8_t found[DIGEST_BYTES],
                     const uint8_t wanted[DIGEST_BYTES], struct error *err)
{
    char found_text[2 * DIGEST_BYTES + 1], wanted_text[2 * DIGEST_BYTES + 1];

    if (memcmp(found, wanted, DIGEST_BYTES) == 0)
        return 0;
    digest_hex(found, DIGEST_BYTES, found_text);
    digest_hex(wanted, DIGEST_BYTES, wanted_text);
    error_set(err, ERR_INVALID,
              "%s: holds the graph of other vectors or other parameters: its key is %s, wanted is "
              "%s",
              path, found_text, wanted_text);
    error_remedy(err, "remove the file, or name another, to have the graph made");
    return -1;
}

static int get_degrees(struct stream *stream, const struct graph_file_header *header,
                       struct graph *graph, struct error *err)
{
    uint16_t degrees[DEGREES_AT_ONCE];
    uint64_t edge_count = 0;

    for (uint32_t row = 0; row < graph->count; row++) {
        uint32_t place = row % DEGREES_AT_ONCE;
        uint32_t left = graph->count - row;

        if (place == 0 &&
            stream_get(stream, degrees,
                       (left < DEGREES_AT_ONCE ? left : DEGREES_AT_ONCE) * sizeof *degrees,
                       err) < 0)
            return -1;
        graph->degrees[row] = load_u16(&degrees[place]);
        if (graph->degrees[row] > graph->max_degree)
            return error_set(err, ERR_CORRUPT,
                             "%s: row %u has %u neighbours, at most %u can be, before offset "
                             "%" PRIu64,
                             stream->path, row, graph->degrees[row], graph->max_degree,
                             stream_offset(stream));
        edge_count += graph->degrees[row];
    }
    if (edge_count != header->edge_count)
        return error_set(err, ERR_CORRUPT,
                         "%s: rows have %" PRIu64 " neighbours, the header says %" PRIu64
                         ", before offset %" PRIu64,
                         stream->path, edge_count, header->edge_count, stream_offset(stream));
    return 0;
}

static int get_neighbours(struct stream *stream, struct graph *graph, uint32_t *marks,
                          struct error *err)
{
    for (uint32_t row = 0; row < graph->count; row++) {
        uint64_t offset = stream_offset(stream);

        if (stream_get(stream, graph->neighbours + (uint64_t)row * graph->max_degree,
                       graph->degrees[row] * sizeof *graph->neighbours, err) < 0)
            return -1;
        if (!list_is_valid(graph, row, marks))
            return error_set(err, ERR_CORRUPT,
                             "%s: the neighbours of row %u at offset %" PRIu64
                             " are not other rows of %u, each once",
                             stream->path, row, offset, graph->count);
    }
    return 0;
}

static int check_padding(struct stream *stream, struct error *err)
{
    while (stream->block < stream->block_count) {
        uint64_t offset = stream_offset(stream);
        uint8_t byte;

        if (stream_get(stream, &byte, 1, err) < 0)
            return -1;
        if (byte != 0)
            return error_set(err, ERR_CORRUPT,
                             "%s: byte %" PRIu64 ", after the end of the graph, is not 0",
                             stream->path, offset);
    }
    return 0;
}

static struct graph *new_graph(const char *path, const struct graph_file_header *header,
                               struct error *err)
{
    struct graph *graph = calloc(1, sizeof *graph);

    if (graph) {
        graph->count = header->count;
        graph->max_degree = header->max_degree;
        graph->entry_point = header->entry_point;
        graph->degrees = malloc((size_t)graph->count * sizeof *graph->degrees);
        /* Zeroed, since whole rows are copied about, their unused ends too. */
        graph->neighbours =
            calloc(graph->count, (size_t)graph->max_degree * sizeof *graph->neighbours);
        if (graph->degrees && graph->neighbours)
            return graph;
    }
    graph_free(graph);
    error_set(err, ERR_NOMEM, "%s: no memory for a graph of %u rows, degree %u", path,
              header->count, header->max_degree);
    return NULL;
}

int graph_file_read(struct vfs *vfs, const char *path, const uint8_t key[DIGEST_BYTES],
                    struct graph **out, struct error *err)
{
    struct graph_file_header header;
    struct stream stream = {0};
    struct graph *graph = NULL;
    struct vfs_file *file = NULL;
    uint32_t *marks = NULL;
    uint64_t file_bytes;
    int rc = -1;

    *out = NULL;
    file = file_open(vfs, path, VFS_READ, err);
    if (!file || file_size(file, path, &file_bytes, err) < 0 ||
        stream_init(&stream, file, path, key, 0, err) < 0)
        goto done;
    if (file_read_exact(file, path, stream.run, BLOCK_BYTES, 0, err) < 0)
        goto done;
    memcpy(&header, stream.run, sizeof header);
    if (check_header(path, stream.run, &header, err) < 0)
        goto done;
    /* Before anything of the size it claims is allocated. */
    if (file_bytes != header.file_bytes) {
        error_set(err, ERR_CORRUPT, "%s: ends at offset %" PRIu64 ", the header says %" PRIu64,
                  path, file_bytes, header.file_bytes);
        goto done;
    }
    if (check_key(path, header.key, key, err) < 0)
        goto done;
    stream.block_count = file_bytes / BLOCK_BYTES;
    graph = new_graph(path, &header, err);
    marks = calloc(header.count, sizeof *marks);
    if (!graph || !marks) {
        error_set(err, ERR_NOMEM, "%s: no memory to check %u rows", path, header.count);
        goto done;
    }
    if (get_degrees(&stream, &header, graph, err) < 0 ||
        get_neighbours(&stream, graph, marks, err) < 0 || check_padding(&stream, err) < 0)
        goto done;
    *out = graph;
    graph = NULL; /* moved to the caller */
    rc = 0;
done:
    free(marks);
    graph_free(graph);
    free(stream.run);
    file_close(file, path, NULL);
    return rc;
}
