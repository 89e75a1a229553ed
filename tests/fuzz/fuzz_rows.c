/* Fuzzes rows and keys of a segment whose checksums are all right: tables, frames, record ends,
 * records and fences may be anything. The sections are kept in memory; the input becomes their
 * payload, either as it is or as frames and tables that are nearly right and then patched.
 *
 * First byte: bit 0: keys, else rows; bit 1: raw payload. */
#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <zstd.h>

#include "index/rows.h"
#include "storage/base/bytes.h"
#include "storage/file.h"
#include "tests/support/fuzz_support.h"

#define BLOCKS 8u
#define BLOCK_PAYLOAD (FILE_BLOCK_BYTES - BLOCK_CRC_BYTES)
#define PAYLOAD_MAX (BLOCKS * BLOCK_PAYLOAD)
#define ROWS 1000u
#define WANTED 24u
#define FRAMES_MAX 32u
#define RAW_MAX (ROWS * (4 + 31))
#define PATCHES_MAX 7u
#define PATCH_BYTES (1 + 3 * PATCHES_MAX)

int LLVMFuzzerInitialize(int *argc, char ***argv);

static const uint8_t id[DIGEST_BYTES] = {9};
static struct segment *segment;
static struct reader *reader;
static uint8_t section_bytes[(BLOCKS + 1) * FILE_BLOCK_BYTES]; /* of the one section, as a file */
static char manifest_path[128];

/* The manifest comes from the real file while the segment is opened; the section from memory. */
static int memory_open(struct vfs *vfs, const char *path, unsigned flags, struct vfs_file **out)
{
    if (strstr(path, "segment.manifest"))
        return vfs_posix()->open(vfs_posix(), path, flags, out);
    *out = malloc(sizeof **out);
    if (!*out)
        return -ENOMEM;
    **out = (struct vfs_file){vfs, -1};
    return 0;
}

static int memory_close(struct vfs_file *file)
{
    free(file);
    return 0;
}

static int memory_pread(struct vfs_file *file, void *buffer, size_t bytes, uint64_t offset,
                        size_t *got)
{
    (void)file;
    *got = 0;
    if (offset >= sizeof section_bytes)
        return 0;
    *got = sizeof section_bytes - offset < bytes ? sizeof section_bytes - offset : bytes;
    memcpy(buffer, section_bytes + offset, *got);
    return 0;
}

static int memory_size(struct vfs_file *file, uint64_t *bytes)
{
    (void)file;
    *bytes = sizeof section_bytes;
    return 0;
}

static int memory_stat(struct vfs *vfs, const char *path, struct vfs_stat *out)
{
    (void)vfs;
    return vfs_posix()->stat(vfs_posix(), path, out);
}

static struct vfs memory = {.open = memory_open,
                            .close = memory_close,
                            .pread = memory_pread,
                            .size = memory_size,
                            .stat = memory_stat};

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    char folder[] = "/tmp/annd-fuzz-XXXXXX", path[64];
    static uint8_t payload[PAYLOAD_MAX];
    struct segment_writer *writer = NULL;
    struct error err = ERROR_INIT;
    uint8_t *bytes = NULL;
    size_t count;

    (void)argc;
    (void)argv;
    require_why(mkdtemp(folder) != NULL, "mkdtemp", &err);
    snprintf(path, sizeof path, "%s/segment", folder);
    snprintf(manifest_path, sizeof manifest_path, "%s/data", path);
    require_why(
        segment_writer_open(vfs_posix(), path, id, ROWS, &writer, &err) == 0 &&
            segment_writer_begin(writer, "data", SECTION_ROWS, FILE_BLOCK_BYTES, &err) == 0 &&
            segment_writer_append(writer, payload, sizeof payload, &err) == 0 &&
            segment_writer_end(writer, &err) == 0 && segment_writer_publish(writer, &err) == 0,
        "writer", &err);
    segment_writer_close(writer);
    require_why(file_read_whole(vfs_posix(), manifest_path, sizeof section_bytes, &bytes, &count,
                                &err) == 0 &&
                    count == sizeof section_bytes,
                "read", &err);
    memcpy(section_bytes, bytes, count);
    free(bytes);
    require_why(segment_open(&memory, path, &segment, &err) == 0, "open", &err);
    file_remove_all(vfs_posix(), folder, NULL);
    require_why(reader_open(READER_PREAD, 8, &reader, &err) == 0, "reader", &err);
    return 0;
}

struct input {
    const uint8_t *data;
    size_t bytes;
};

static uint32_t take(struct input *input, uint32_t bytes)
{
    uint32_t value = 0;

    for (uint32_t i = 0; i < bytes && input->bytes > 0; i++) {
        value |= (uint32_t)*input->data++ << 8 * i;
        input->bytes--;
    }
    return value;
}

static void skip(struct input *input, size_t bytes)
{
    bytes = bytes < input->bytes ? bytes : input->bytes;
    input->data += bytes;
    input->bytes -= bytes;
}

/* Up to `most` bytes of the input, as they are. */
static size_t take_bytes(struct input *input, uint8_t *out, size_t most)
{
    size_t bytes = input->bytes < most ? input->bytes : most;

    memcpy(out, input->data, bytes);
    input->data += bytes;
    input->bytes -= bytes;
    return bytes;
}

/* A few bytes somewhere become others, counted from the end where the tables are. */
static void patch(struct input *input, uint8_t *payload, uint64_t bytes)
{
    for (uint32_t patches = take(input, 1) % (PATCHES_MAX + 1); patches > 0 && bytes > 0;
         patches--) {
        uint32_t at = take(input, 2);

        payload[bytes - 1 - at % bytes] = (uint8_t)take(input, 1);
    }
}

/* Frames of records whose ends come from the input, and their table. */
static uint64_t rows_payload(struct input *input, uint8_t *payload)
{
    uint32_t frames = 1 + take(input, 1) % FRAMES_MAX, row = 0, made = 0;
    uint64_t offsets[FRAMES_MAX], at = 0;
    uint32_t firsts[FRAMES_MAX];
    static uint8_t raw[RAW_MAX];
    struct input patches = *input;

    skip(input, PATCH_BYTES); /* read again below */
    for (; made < frames; made++) {
        uint32_t rows = made + 1 == frames ? ROWS - row : 1 + take(input, 1) % 31;
        uint32_t end = 0, period = 0;
        uint32_t lengths[4];
        size_t bytes = 4 * rows, given;

        for (uint32_t i = 0; i < 4; i++)
            period += lengths[i] = take(input, 1) % 32;
        for (uint32_t i = 0; i < rows; i++) {
            end += lengths[i % 4];
            store_u32(raw + 4 * i, end);
        }
        /* Four records of the input's, again and again. */
        given = take_bytes(input, raw + bytes, end < period ? end : period);
        for (size_t i = given; i < end; i++)
            raw[bytes + i] = given ? raw[bytes + i - given] : 0;
        bytes += end;
        size_t room = PAYLOAD_MAX - at - 24 - 12 * FRAMES_MAX;
        size_t put = ZSTD_compress(payload + at, room, raw, bytes, 1);

        if (ZSTD_isError(put))
            break;
        offsets[made] = at;
        firsts[made] = row;
        at += put;
        row += rows;
    }
    uint64_t table = at;

    for (uint32_t i = 0; i < made; i++, at += 12) {
        store_u64(payload + at, offsets[i]);
        store_u32(payload + at + 8, firsts[i]);
    }
    store_u64(payload + at, table);
    store_u64(payload + at + 8, made);
    store_u64(payload + at + 16, ROWS);
    patch(&patches, payload, at + 24);
    return at + 24;
}

/* Entries from the input, in its order, and their fences. */
static uint64_t keys_payload(struct input *input, uint8_t *payload)
{
    uint32_t entries = take(input, 2) % (ROWS + 1), fences = (entries + 340) / 341;
    uint64_t at = 0, ordinal = 0;
    struct input patches = *input;

    skip(input, PATCH_BYTES);
    for (uint32_t i = 0; i < entries; i++, at += 12) {
        ordinal += take(input, 1) % 3;
        store_u64(payload + at, ordinal);
        store_u32(payload + at + 8, i);
    }
    for (uint32_t i = 0; i < fences; i++, at += 8)
        memcpy(payload + at, payload + 12 * 341 * (size_t)i, 8);
    store_u64(payload + at, entries);
    store_u64(payload + at + 8, fences);
    patch(&patches, payload, at + 16);
    return at + 16;
}

/* Puts the payload into the section's blocks, with right checksums. */
static void section_fill(const uint8_t *payload)
{
    for (uint32_t i = 0; i < BLOCKS; i++) {
        uint8_t *block = section_bytes + (i + 1) * FILE_BLOCK_BYTES, number[8];
        uint32_t crc;

        memcpy(block, payload + (size_t)i * BLOCK_PAYLOAD, BLOCK_PAYLOAD);
        store_u32(number, 0); /* the section's */
        crc = crc32c(crc32c(0, id, sizeof id), number, 4);
        store_u64(number, i + 1);
        crc = crc32c(crc32c(crc, number, sizeof number), block, BLOCK_PAYLOAD);
        store_u32(block + BLOCK_PAYLOAD, crc);
    }
}

static void read_records(const struct rows_record *records, uint32_t count)
{
    for (uint32_t i = 0; i < count; i++) {
        struct record_cursor cursor;
        struct error err = ERROR_INIT;
        const char *name;
        uint32_t field, name_bytes, steps = 0;
        struct value value;
        int rc = -1;

        if (record_open(records[i].data, records[i].bytes, &cursor, &err) == 0)
            while ((rc = record_next(&cursor, &field, &name, &name_bytes, &value, &err)) == 1)
                require_why(++steps <= records[i].bytes, "a record without end", &err);
        require_why(rc == 0 || err.code == ERR_CORRUPT, "record: another error", &err);
    }
}

static void read_rows(const struct segment_section *section, const uint32_t *wanted)
{
    struct rows_record records[WANTED];
    struct error err = ERROR_INIT;
    struct rows *rows = NULL;
    uint8_t *storage = NULL;

    if (rows_open(segment, section, &rows, &err) == 0) {
        if (rows_fetch(rows, reader, wanted, WANTED, records, &storage, &err) == 0)
            read_records(records, WANTED);
        else
            require_why(err.code == ERR_CORRUPT, "rows_fetch: another error", &err);
    } else {
        require_why(err.code == ERR_CORRUPT, "rows_open: another error", &err);
    }
    free(storage);
    rows_close(rows);
}

static void read_keys(const struct segment_section *section, const uint32_t *wanted)
{
    uint32_t positions[WANTED * 4], found[WANTED];
    uint64_t ordinals[WANTED];
    struct error err = ERROR_INIT;
    struct keys *keys = NULL;

    for (uint32_t i = 0; i < WANTED; i++)
        ordinals[i] = wanted[i];
    if (keys_open(segment, section, &keys, &err) == 0) {
        if (keys_find(keys, reader, ordinals, WANTED, 4, positions, found, &err) == 0) {
            for (uint32_t i = 0; i < WANTED; i++) {
                require_why(found[i] <= 4, "more positions than asked for", &err);
                for (uint32_t j = 0; j < found[i]; j++)
                    require_why(positions[i * 4 + j] < ROWS, "a position outside the segment",
                                &err);
            }
        } else {
            require_why(err.code == ERR_CORRUPT, "keys_find: another error", &err);
        }
    } else {
        require_why(err.code == ERR_CORRUPT, "keys_open: another error", &err);
    }
    keys_close(keys);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    static uint8_t payload[PAYLOAD_MAX];
    struct input input = {data, bytes};
    uint32_t kind = take(&input, 1), wanted[WANTED];
    struct segment_section section;

    for (uint32_t i = 0; i < WANTED; i++)
        wanted[i] = i % 3 == 0 ? i * ROWS / WANTED : take(&input, 2) % ROWS;
    memset(payload, 0, sizeof payload);
    section = *segment_section_at(segment, 0);
    if (kind & 2)
        section.payload_bytes = take_bytes(&input, payload, sizeof payload);
    else
        section.payload_bytes =
            kind & 1 ? keys_payload(&input, payload) : rows_payload(&input, payload);
    section.block_count = (section.payload_bytes + BLOCK_PAYLOAD - 1) / BLOCK_PAYLOAD;
    section_fill(payload);
    if (kind & 1)
        read_keys(&section, wanted);
    else
        read_rows(&section, wanted);
    require_why(reader_in_flight(reader) == 0, "reads are left in flight",
                &(struct error)ERROR_INIT);
    return 0;
}
