/* Fuzzes segment_open and everything that reads an open segment. A sound segment is written once
 * and kept in memory; the input is a list of edits to it: entries of segment.manifest (which then
 * gets a right CRC), bytes and lengths of section files, header CRCs made right again. Whatever
 * comes of it must open or be refused, and be read or be refused, without a crash, a leak or a
 * read outside the buffers. */
#include <errno.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "storage/base/bytes.h"
#include "storage/file.h"
#include "storage/format.h"
#include "storage/segment.h"
#include "storage/segment_writer.h"
#include "tests/support/fuzz_support.h"

int LLVMFuzzerInitialize(int *argc, char ***argv);

#define FILE_COUNT 4u /* three sections, then segment.manifest */
#define FILE_BYTES_MAX (1u << 16)

struct memory_file {
    struct vfs_file file;
    uint32_t number;
};

static const char *const names[FILE_COUNT] = {"f.pages", "f.codes", "stats", "segment.manifest"};
static uint8_t *originals[FILE_COUNT], *contents[FILE_COUNT];
static size_t original_bytes[FILE_COUNT], content_bytes[FILE_COUNT];
static struct reader *reader;

static int memory_open(struct vfs *vfs, const char *path, unsigned flags, struct vfs_file **out)
{
    const char *name = strrchr(path, '/');

    if (flags & ~(unsigned)(VFS_READ | VFS_DIRECT))
        return -EROFS;
    for (uint32_t i = 0; i < FILE_COUNT; i++) {
        struct memory_file *file;

        if (strcmp(name ? name + 1 : path, names[i]) != 0)
            continue;
        file = malloc(sizeof *file);
        if (!file)
            return -ENOMEM;
        file->file.vfs = vfs;
        file->file.fd = -1;
        file->number = i;
        *out = &file->file;
        return 0;
    }
    return -ENOENT;
}

static int memory_close(struct vfs_file *file)
{
    free(file);
    return 0;
}

static int memory_pread(struct vfs_file *file, void *buffer, size_t bytes, uint64_t offset,
                        size_t *got)
{
    uint32_t i = ((struct memory_file *)file)->number;

    *got = 0;
    if (offset >= content_bytes[i])
        return 0;
    *got = content_bytes[i] - offset < bytes ? content_bytes[i] - offset : bytes;
    memcpy(buffer, contents[i] + offset, *got);
    return 0;
}

static int memory_size(struct vfs_file *file, uint64_t *bytes)
{
    *bytes = content_bytes[((struct memory_file *)file)->number];
    return 0;
}

static int memory_stat(struct vfs *vfs, const char *path, struct vfs_stat *out)
{
    struct vfs_file *file;
    int rc = memory_open(vfs, path, VFS_READ, &file);

    if (rc < 0)
        return rc;
    memset(out, 0, sizeof *out);
    memory_size(file, &out->bytes);
    return memory_close(file);
}

static struct vfs memory = {.open = memory_open,
                            .close = memory_close,
                            .pread = memory_pread,
                            .size = memory_size,
                            .stat = memory_stat};

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    static const uint32_t payload_bytes[] = {2 * 4092, 5000, 0};
    char folder[] = "/tmp/annd-fuzz-XXXXXX", path[64], file[128];
    struct segment_writer *writer = NULL;
    uint8_t id[DIGEST_BYTES] = {7}, payload[2 * 4092];
    struct error err = ERROR_INIT;

    (void)argc;
    (void)argv;
    require_why(mkdtemp(folder) != NULL, "mkdtemp", &err);
    snprintf(path, sizeof path, "%s/segment", folder);
    for (size_t i = 0; i < sizeof payload; i++)
        payload[i] = (uint8_t)(i * 31 + i / 256);
    require_why(segment_writer_open(vfs_posix(), path, id, 5, &writer, &err) == 0, "writer", &err);
    for (uint32_t i = 0; i < 3; i++)
        require_why(segment_writer_begin(writer, names[i], SECTION_PAGES, i == 1 ? 8192 : 4096,
                                         &err) == 0 &&
                        segment_writer_append(writer, payload, payload_bytes[i], &err) == 0 &&
                        segment_writer_end(writer, &err) == 0,
                    "section", &err);
    require_why(segment_writer_publish(writer, &err) == 0, "publish", &err);
    segment_writer_close(writer);
    for (uint32_t i = 0; i < FILE_COUNT; i++) {
        snprintf(file, sizeof file, "%s/%s", path, names[i]);
        require_why(file_read_whole(vfs_posix(), file, FILE_BYTES_MAX, &originals[i],
                                    &original_bytes[i], &err) == 0,
                    "read", &err);
        contents[i] = malloc(FILE_BYTES_MAX);
        require_why(contents[i] != NULL, "memory", &err);
    }
    file_remove_all(vfs_posix(), folder, NULL);
    require_why(reader_open(READER_PREAD, 4, &reader, &err) == 0, "reader", &err);
    return 0;
}

struct input {
    const uint8_t *data;
    size_t bytes;
};

static uint64_t take(struct input *input, uint32_t bytes)
{
    uint64_t value = 0;

    for (uint32_t i = 0; i < bytes && input->bytes > 0; i++) {
        value |= (uint64_t)*input->data++ << 8 * i;
        input->bytes--;
    }
    return value;
}

/* A name that is in the manifest, or one like it that may not be. */
static void pick_entry(struct input *input, const struct manifest *manifest, char out[64])
{
    static const char *const whats[] = {"name",       "kind",   "block_bytes", "payload_bytes",
                                        "file_bytes", "crc32c", "sha256",      "other"};
    uint64_t pick = take(input, 1);

    if (pick & 0x80)
        snprintf(out, 64, "section.%03u.%s", (unsigned)(pick >> 3 & 15), whats[pick & 7]);
    else if (manifest_count(manifest) > 0)
        snprintf(out, 64, "%s",
                 manifest_entry(manifest, (uint32_t)(pick % manifest_count(manifest)), NULL, 0));
    else
        snprintf(out, 64, "id");
}

static void edit(struct input *input, struct manifest *manifest)
{
    uint64_t op = take(input, 1);
    uint32_t file = (uint32_t)(op >> 4) % (FILE_COUNT - 1);
    char entry[64], text[64];
    uint64_t bytes;

    switch (op % 8) {
    case 0:
        pick_entry(input, manifest, entry);
        manifest_set_u64(manifest, entry, take(input, 8), NULL);
        break;
    case 1:
        pick_entry(input, manifest, entry);
        manifest_set_u64(manifest, entry, take(input, 2), NULL);
        break;
    case 2:
    case 3:
        pick_entry(input, manifest, entry);
        bytes = take(input, 1) % sizeof text;
        memset(text, 0, sizeof text);
        for (uint64_t i = 0; i < bytes; i++)
            text[i] = (char)take(input, 1);
        if (op % 8 == 2)
            manifest_set_text(manifest, entry, text, NULL);
        else
            manifest_set_bytes(manifest, entry, text, bytes, NULL);
        break;
    case 4:
        pick_entry(input, manifest, entry);
        manifest_remove(manifest, entry);
        break;
    case 5:
        contents[file][take(input, 2)] = (uint8_t)take(input, 1);
        break;
    case 6:
        content_bytes[file] = take(input, 2);
        break;
    case 7:
        store_u32(contents[file] + 12, 0);
        store_u32(contents[file] + 12, crc32c(0, contents[file], sizeof(struct section_header)));
        break;
    }
}

static void read_all(const struct segment *segment, uint64_t offset, uint64_t bytes)
{
    static uint8_t out[FILE_BYTES_MAX], again[FILE_BYTES_MAX];
    uint64_t reads = 0;

    segment_check(segment, NULL, NULL);
    for (uint32_t i = 0; i < segment_section_count(segment); i++) {
        const struct segment_section *section = segment_section_at(segment, i);
        struct segment_span spans[2] = {{section, offset, (uint32_t)bytes, out},
                                        {section, 0, (uint32_t)section->payload_bytes, again}};
        struct error err = ERROR_INIT;
        int rc;

        /* The file is that small, and its length was checked. */
        require_why(section->payload_bytes <= sizeof out, "a payload larger than its file", &err);
        rc = segment_read(segment, section, 0, section->payload_bytes, again, &err);
        require_why(rc == 0 || err.code == ERR_CORRUPT, "unexpected error", &err);
        if (bytes <= sizeof out && segment_read(segment, section, offset, bytes, out, NULL) == 0 &&
            rc == 0)
            require_why(memcmp(out, again + offset, bytes) == 0, "two reads differ", &err);
        if (bytes <= sizeof out)
            segment_read_spans(segment, reader, spans, 2, &reads, NULL);
        require_why(reader_in_flight(reader) == 0, "reads are left in flight", &err);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    struct input input = {data, bytes};
    struct manifest *manifest = NULL;
    struct segment *segment = NULL;
    struct error err = ERROR_INIT;
    uint64_t offset = take(&input, 3), length = take(&input, 2);
    uint8_t *encoded = NULL;
    size_t encoded_bytes;

    for (uint32_t i = 0; i < FILE_COUNT; i++) {
        memset(contents[i], 0, FILE_BYTES_MAX);
        memcpy(contents[i], originals[i], original_bytes[i]);
        content_bytes[i] = original_bytes[i];
    }
    require_why(manifest_decode(MANIFEST_SEGMENT, originals[3], original_bytes[3], "m", &manifest,
                                &err) == 0,
                "manifest", &err);
    for (int edits = 0; input.bytes > 0 && edits < 64; edits++)
        edit(&input, manifest);
    if (manifest_encode(manifest, &encoded, &encoded_bytes, NULL) == 0 &&
        encoded_bytes <= FILE_BYTES_MAX) {
        memcpy(contents[3], encoded, encoded_bytes);
        content_bytes[3] = encoded_bytes;
    }
    if (segment_open(&memory, "segment", &segment, &err) == 0)
        read_all(segment, offset, length);
    else
        require_why(err.code == ERR_CORRUPT || err.code == ERR_UNSUPPORTED ||
                        err.code == ERR_NOT_FOUND || err.code == ERR_INVALID,
                    "unexpected error", &err);
    segment_close(segment);
    manifest_free(manifest);
    free(encoded);
    return 0;
}
