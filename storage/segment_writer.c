/* How it works: payload goes into a run of blocks in one aligned buffer; a block that fills up gets
 * its CRC, a run that fills up (about 1 MiB) is checksummed for the manifest and written in one
 * call, past the page cache. The header block is written last, when the file's length is known, and
 * the file is synced before the next section starts. A call that fails makes the writer refuse
 * everything after it: half a section can never be published. A preview is a manifest in the
 * unpublished folder: nobody else opens that, and publishing writes and syncs a new one first. */
#include "storage/segment_writer.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "storage/base/bytes.h"
#include "storage/file.h"
#include "storage/format.h"

#define RUN_BYTES (1u << 20)

struct segment_writer {
    struct vfs *vfs;
    char *path;
    char *tmp_path;
    struct manifest *manifest;
    uint8_t id[DIGEST_BYTES];
    uint32_t section_count; /* ended or open */
    bool tmp_made;
    bool failed;
    bool published;
    bool previewed; /* a manifest of the sections so far is there */

    /* The open section; file is NULL when there is none. */
    struct vfs_file *file;
    char file_path[FILE_PATH_MAX];
    char name[SECTION_NAME_MAX];
    enum section_kind kind;
    uint32_t block_bytes;
    uint32_t seed; /* CRC of segment id and section number, where every block's CRC starts */
    uint64_t payload_bytes;
    uint64_t block_count;  /* full or begun */
    uint64_t file_offset;  /* where the run goes */
    uint8_t *run;          /* run_capacity bytes */
    uint32_t run_capacity; /* multiple of block_bytes */
    uint32_t run_bytes;    /* full blocks */
    uint32_t block_fill;   /* payload bytes of the block after them */
    uint32_t crc;          /* of the file past the header block */
    struct digest *digest;
};

static bool section_name_is_valid(const char *name)
{
    size_t bytes = strlen(name);

    if (bytes == 0 || bytes >= SECTION_NAME_MAX || name[0] == '.' ||
        strcmp(name, "segment.manifest") == 0)
        return false;
    return strspn(name, "abcdefghijklmnopqrstuvwxyz0123456789._-") == bytes;
}

/* Everything after a failure fails; the first error has told why. */
static int usable(const struct segment_writer *writer, bool section_open, struct error *err)
{
    if (writer->failed || writer->published)
        return error_set(err, ERR_INVALID, "%s: this writer has %s", writer->tmp_path,
                         writer->failed ? "failed before" : "published already");
    if (section_open && !writer->file)
        return error_set(err, ERR_INVALID, "%s: no section is open", writer->tmp_path);
    if (!section_open && writer->file)
        return error_set(err, ERR_INVALID, "%s: section %s is still open", writer->tmp_path,
                         writer->name);
    return 0;
}

/* Lets go of the open section, ended or not. */
static int section_release(struct segment_writer *writer, struct error *err)
{
    uint8_t unused[DIGEST_BYTES];
    int rc = 0;

    if (writer->file)
        rc = file_close(writer->file, writer->file_path, err);
    writer->file = NULL;
    if (writer->digest)
        digest_finish(writer->digest, unused);
    writer->digest = NULL;
    free(writer->run);
    writer->run = NULL;
    return rc;
}

int segment_writer_open(struct vfs *vfs, const char *path, const uint8_t id[DIGEST_BYTES],
                        uint64_t row_count, struct segment_writer **out, struct error *err)
{
    struct segment_writer *writer = calloc(1, sizeof *writer);
    size_t path_bytes = strlen(path);
    int rc = -1;

    while (path_bytes > 1 && path[path_bytes - 1] == '/')
        path_bytes--; /* "seg/" and "seg" are one place, and ".tmp" must go beside it */
    if (writer) {
        writer->path = strndup(path, path_bytes);
        writer->tmp_path = malloc(path_bytes + sizeof ".tmp");
        writer->manifest = manifest_new(MANIFEST_SEGMENT);
    }
    if (!writer || !writer->path || !writer->tmp_path || !writer->manifest) {
        error_set(err, ERR_NOMEM, "%s: no memory for a segment writer", path);
        goto done;
    }
    writer->vfs = vfs;
    memcpy(writer->id, id, DIGEST_BYTES);
    memcpy(writer->tmp_path, writer->path, path_bytes);
    memcpy(writer->tmp_path + path_bytes, ".tmp", sizeof ".tmp");
    if (path_bytes == 0 || path_bytes + sizeof ".tmp" > FILE_PATH_MAX) {
        error_set(err, ERR_INVALID, "\"%s\" cannot be the path of a segment", path);
        goto done;
    }
    if (file_exists(vfs, writer->path)) {
        error_set(err, ERR_EXISTS, "%s is there already", writer->path);
        goto done;
    }
    if (manifest_set_bytes(writer->manifest, "id", id, DIGEST_BYTES, err) < 0 ||
        manifest_set_u64(writer->manifest, "rows", row_count, err) < 0 ||
        file_remove_all(vfs, writer->tmp_path, err) < 0 ||
        file_mkdir(vfs, writer->tmp_path, err) < 0)
        goto done;
    writer->tmp_made = true;
    *out = writer;
    writer = NULL;
    rc = 0;
done:
    segment_writer_close(writer);
    return rc;
}

void segment_writer_close(struct segment_writer *writer)
{
    if (!writer)
        return;
    section_release(writer, NULL);
    if (writer->tmp_made && !writer->published)
        file_remove_all(writer->vfs, writer->tmp_path, NULL);
    manifest_free(writer->manifest);
    free(writer->path);
    free(writer->tmp_path);
    free(writer);
}

struct manifest *segment_writer_manifest(struct segment_writer *writer)
{
    return writer->manifest;
}

static int section_set_u64(struct segment_writer *writer, const char *what, uint64_t value,
                           struct error *err)
{
    char name[64];

    snprintf(name, sizeof name, "section.%03" PRIu32 ".%s", writer->section_count - 1, what);
    return manifest_set_u64(writer->manifest, name, value, err);
}

/* True when an earlier section has this name. */
static bool name_is_taken(const struct segment_writer *writer, const char *name)
{
    for (uint32_t i = 0; i < writer->section_count; i++) {
        char entry[64];
        const char *taken;

        snprintf(entry, sizeof entry, "section.%03" PRIu32 ".name", i);
        if (manifest_get_text(writer->manifest, entry, &taken, NULL) == 0 &&
            strcmp(taken, name) == 0)
            return true;
    }
    return false;
}

int segment_writer_begin(struct segment_writer *writer, const char *name, enum section_kind kind,
                         uint32_t block_bytes, struct error *err)
{
    uint8_t number[4];
    char entry[64];

    if (usable(writer, false, err) < 0)
        return -1;
    if (!section_name_is_valid(name))
        return error_set(err, ERR_INVALID,
                         "%s: section name \"%.40s\" must be 1 to %u characters of [a-z0-9._-]",
                         writer->tmp_path, name, SECTION_NAME_MAX - 1);
    if (block_bytes == 0 || block_bytes % FILE_BLOCK_BYTES != 0 ||
        block_bytes > SECTION_BLOCK_BYTES_MAX)
        return error_set(err, ERR_INVALID,
                         "%s/%s: blocks of %" PRIu32 " bytes; wanted a multiple of %u up to %u",
                         writer->tmp_path, name, block_bytes, FILE_BLOCK_BYTES,
                         SECTION_BLOCK_BYTES_MAX);
    if (writer->section_count == SECTION_COUNT_MAX)
        return error_set(err, ERR_INVALID, "%s: more than %u sections", writer->tmp_path,
                         SECTION_COUNT_MAX);
    if (name_is_taken(writer, name))
        return error_set(err, ERR_INVALID, "%s: section %s is there already", writer->tmp_path,
                         name);
    if (file_path_join(writer->file_path, writer->tmp_path, name, err) < 0)
        return -1;

    writer->failed = true; /* until all of the below went well */
    memset(writer->name, 0, sizeof writer->name);
    memcpy(writer->name, name, strlen(name));
    writer->kind = kind;
    writer->block_bytes = block_bytes;
    writer->run_capacity =
        block_bytes < RUN_BYTES ? RUN_BYTES / block_bytes * block_bytes : block_bytes;
    writer->payload_bytes = 0;
    writer->block_count = 0;
    writer->file_offset = block_bytes;
    writer->run_bytes = 0;
    writer->block_fill = 0;
    writer->crc = 0;
    store_u32(number, writer->section_count);
    writer->seed = crc32c(crc32c(0, writer->id, DIGEST_BYTES), number, sizeof number);
    writer->run = file_buffer_alloc(writer->run_capacity);
    writer->digest = digest_new();
    if (!writer->run || !writer->digest)
        return error_set(err, ERR_NOMEM, "%s: no memory for a run of %" PRIu32 " bytes",
                         writer->file_path, writer->run_capacity);
    writer->file =
        file_open(writer->vfs, writer->file_path, VFS_WRITE | VFS_CREATE | VFS_DIRECT, err);
    if (!writer->file)
        return -1;
    writer->section_count++;
    snprintf(entry, sizeof entry, "section.%03" PRIu32 ".name", writer->section_count - 1);
    if (manifest_set_text(writer->manifest, entry, name, err) < 0)
        return -1;
    writer->failed = false;
    return 0;
}

static int write_run(struct segment_writer *writer, struct error *err)
{
    if (writer->run_bytes == 0)
        return 0;
    writer->crc = crc32c(writer->crc, writer->run, writer->run_bytes);
    digest_update(writer->digest, writer->run, writer->run_bytes);
    if (file_write_full(writer->file, writer->file_path, writer->run, writer->run_bytes,
                        writer->file_offset, err) < 0)
        return -1;
    writer->file_offset += writer->run_bytes;
    writer->run_bytes = 0;
    return 0;
}

/* Closes the block being filled: zeros to its end, then its CRC. */
static int finish_block(struct segment_writer *writer, struct error *err)
{
    uint8_t *block = writer->run + writer->run_bytes;
    uint32_t payload = writer->block_bytes - BLOCK_CRC_BYTES;
    uint8_t number[8];
    uint32_t crc;

    memset(block + writer->block_fill, 0, payload - writer->block_fill);
    store_u64(number, writer->block_count); /* counted from 1: block 0 is the header */
    crc = crc32c(writer->seed, number, sizeof number);
    store_u32(block + payload, crc32c(crc, block, payload));
    writer->block_fill = 0;
    writer->run_bytes += writer->block_bytes;
    return writer->run_bytes == writer->run_capacity ? write_run(writer, err) : 0;
}

int segment_writer_append(struct segment_writer *writer, const void *data, uint64_t bytes,
                          struct error *err)
{
    const uint8_t *from = data;
    uint32_t payload;

    if (usable(writer, true, err) < 0)
        return -1;
    payload = writer->block_bytes - BLOCK_CRC_BYTES;
    while (bytes > 0) {
        uint64_t part = payload - writer->block_fill;

        if (part > bytes)
            part = bytes;
        if (writer->block_fill == 0)
            writer->block_count++;
        memcpy(writer->run + writer->run_bytes + writer->block_fill, from, part);
        writer->block_fill += (uint32_t)part;
        writer->payload_bytes += part;
        from += part;
        bytes -= part;
        if (writer->block_fill == payload && finish_block(writer, err) < 0) {
            writer->failed = true;
            return -1;
        }
    }
    return 0;
}

uint64_t segment_writer_offset(const struct segment_writer *writer)
{
    return writer->file ? writer->payload_bytes : 0;
}

static void fill_header(const struct segment_writer *writer, uint8_t *block)
{
    struct section_header header;

    memset(&header, 0, sizeof header);
    memcpy(header.magic, SECTION_MAGIC, sizeof header.magic);
    header.version = SECTION_VERSION;
    header.file_bytes = writer->file_offset;
    header.kind = writer->kind;
    header.number = writer->section_count - 1;
    header.block_bytes = writer->block_bytes;
    memcpy(header.segment_id, writer->id, DIGEST_BYTES);
    memcpy(header.name, writer->name, sizeof header.name);
    header.crc32c = crc32c(0, &header, sizeof header);
    memset(block, 0, writer->block_bytes);
    memcpy(block, &header, sizeof header);
}

int segment_writer_end(struct segment_writer *writer, struct error *err)
{
    uint8_t sha256[DIGEST_BYTES];
    uint64_t body_bytes;
    uint32_t crc;
    char entry[64];

    if (usable(writer, true, err) < 0)
        return -1;
    writer->failed = true;
    if (writer->block_fill > 0 && finish_block(writer, err) < 0)
        return -1;
    if (write_run(writer, err) < 0)
        return -1;
    body_bytes = writer->file_offset - writer->block_bytes;
    fill_header(writer, writer->run);
    crc = crc32c(0, writer->run, writer->block_bytes);
    crc = crc32c_combine(crc, writer->crc, body_bytes);
    digest_update(writer->digest, writer->run, writer->block_bytes);
    digest_finish(writer->digest, sha256);
    writer->digest = NULL;
    if (file_write_full(writer->file, writer->file_path, writer->run, writer->block_bytes, 0, err) <
            0 ||
        file_sync(writer->file, writer->file_path, err) < 0 || section_release(writer, err) < 0)
        return -1;
    snprintf(entry, sizeof entry, "section.%03" PRIu32 ".sha256", writer->section_count - 1);
    if (section_set_u64(writer, "kind", writer->kind, err) < 0 ||
        section_set_u64(writer, "block_bytes", writer->block_bytes, err) < 0 ||
        section_set_u64(writer, "payload_bytes", writer->payload_bytes, err) < 0 ||
        section_set_u64(writer, "file_bytes", writer->file_offset, err) < 0 ||
        section_set_u64(writer, "crc32c", crc, err) < 0 ||
        manifest_set_bytes(writer->manifest, entry, sha256, sizeof sha256, err) < 0)
        return -1;
    writer->failed = false;
    return 0;
}

static int write_manifest(struct segment_writer *writer, bool durable, struct error *err)
{
    char path[FILE_PATH_MAX];
    struct vfs_file *file = NULL;
    uint8_t *data = NULL;
    size_t bytes = 0;
    int rc = -1;

    if (file_path_join(path, writer->tmp_path, "segment.manifest", err) < 0 ||
        manifest_encode(writer->manifest, &data, &bytes, err) < 0)
        goto done;
    if (writer->previewed && file_remove_all(writer->vfs, path, err) < 0)
        goto done;
    file = file_open(writer->vfs, path, VFS_WRITE | VFS_CREATE, err);
    if (!file || file_write_full(file, path, data, bytes, 0, err) < 0 ||
        (durable && file_sync(file, path, err) < 0))
        goto done;
    rc = 0;
done:
    if (file_close(file, path, err) < 0)
        rc = -1;
    free(data);
    return rc;
}

int segment_writer_preview(struct segment_writer *writer, struct error *err)
{
    if (usable(writer, false, err) < 0)
        return -1;
    writer->failed = true;
    if (write_manifest(writer, false, err) < 0)
        return -1;
    writer->previewed = true;
    writer->failed = false;
    return 0;
}

const char *segment_writer_folder(const struct segment_writer *writer)
{
    return writer->tmp_path;
}

int segment_writer_publish(struct segment_writer *writer, struct error *err)
{
    char folder[FILE_PATH_MAX];

    if (usable(writer, false, err) < 0)
        return -1;
    writer->failed = true;
    file_path_folder(folder, writer->path);
    if (write_manifest(writer, true, err) < 0 ||
        file_dirsync(writer->vfs, writer->tmp_path, err) < 0)
        return -1;
    if (file_exists(writer->vfs, writer->path)) /* rename would replace an empty directory */
        return error_set(err, ERR_EXISTS, "%s is there already", writer->path);
    if (file_rename(writer->vfs, writer->tmp_path, writer->path, err) < 0)
        return -1;
    if (file_dirsync(writer->vfs, folder, err) < 0) {
        /* Whole, but perhaps not there after a power cut: taken back, so that failure means
         * nothing was published and the caller may try again. */
        file_rename(writer->vfs, writer->path, writer->tmp_path, NULL);
        return -1;
    }
    writer->failed = false;
    writer->published = true;
    return 0;
}
