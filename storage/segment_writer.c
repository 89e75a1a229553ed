/* How it works: payload goes into a run of blocks in one aligned buffer; a block that fills up gets
 * its CRC, a run that fills up (about 1 MiB) is written in one call, past the page cache, while a
 * thread checksums it for the manifest: SHA-256 is slower than the disk. There are two runs; one is
 * filled while the other is hashed. The header block is written last, when the file's length is
 * known, and the file is synced before the next section starts. A call that fails makes the writer
 * refuse everything after it: half a section can never be published.
 *
 * A preview is a manifest in the unpublished folder: nobody else opens that, and publishing writes
 * and syncs a new one first. A checkpoint is a manifest too, named .checkpoint, which no section
 * can be called: the sections that are whole, and of the open one how many blocks are written and
 * synced, with their CRC-32C and the state of their SHA-256. Every manifest is written aside and
 * renamed, so a kill leaves the one before.
 *
 * Resuming takes the manifest that knows more whole sections, .checkpoint or segment.manifest: the
 * latter is the better one when publishing was killed. It believes a section's length and header
 * block, which is written only once all else is there. It then writes the checkpoint again with
 * what was really found, before it removes the rest: otherwise a section that is made again could
 * be taken for the old one after the next kill. What bytes the open section has is for begin_at to
 * find out: it reads its blocks back from the disk, past the page cache, checks each one's CRC and
 * the CRC of all, and cuts off what was written after the checkpoint. */
#include "storage/segment_writer.h"

#include <inttypes.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "storage/base/bytes.h"
#include "storage/file.h"
#include "storage/format.h"

#define RUN_BYTES (1u << 20)
#define MANIFEST_NAME "segment.manifest"
#define CHECKPOINT_NAME ".checkpoint"
#define ASIDE_NAME ".aside" /* a manifest being written */

/* Checksums a file past its header block, on a thread of its own when runs are full. The thread
 * owns crc and digest while `data` is set. */
struct hasher {
    pthread_t thread;
    bool started;
    bool refused; /* no thread to be had: the caller's does the work */
    pthread_mutex_t mutex;
    pthread_cond_t changed;
    bool stop;
    const uint8_t *data; /* handed over and not done; NULL: idle */
    uint32_t bytes;
    uint32_t crc;
    struct digest *digest;
};

/* The beginning of a section, as a checkpoint has it. */
struct part {
    bool there;
    char name[SECTION_NAME_MAX];
    uint32_t kind;
    uint32_t block_bytes;
    uint64_t blocks;                    /* whole, header not counted */
    uint32_t crc;                       /* of those */
    uint8_t digest[DIGEST_STATE_BYTES]; /* of those, running */
};

struct segment_writer {
    struct vfs *vfs;
    char *path;
    char *tmp_path;
    struct manifest *manifest;
    uint8_t id[DIGEST_BYTES];
    uint32_t section_count; /* whole; also the number of the open one */
    bool tmp_made;
    bool failed;
    bool published;
    bool checkpointed;   /* there is a checkpoint: the folder outlives the writer */
    bool folder_durable; /* tmp_path's entry in its folder is synced */
    struct part left;    /* what a resumed checkpoint has of section section_count */

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
    uint8_t *runs[2];      /* run_capacity bytes each */
    uint8_t *run;          /* the one being filled */
    uint32_t run_capacity; /* multiple of block_bytes */
    uint32_t run_bytes;    /* full blocks */
    uint32_t block_fill;   /* payload bytes of the block after them */
    struct hasher hasher;
};

static void hash(struct hasher *hasher, const uint8_t *data, uint32_t bytes)
{
    hasher->crc = crc32c(hasher->crc, data, bytes);
    digest_update(hasher->digest, data, bytes);
}

static void *hasher_main(void *context)
{
    struct hasher *hasher = context;

    pthread_mutex_lock(&hasher->mutex);
    for (;;) {
        while (!hasher->data && !hasher->stop)
            pthread_cond_wait(&hasher->changed, &hasher->mutex);
        if (!hasher->data)
            break;
        pthread_mutex_unlock(&hasher->mutex);
        hash(hasher, hasher->data, hasher->bytes);
        pthread_mutex_lock(&hasher->mutex);
        hasher->data = NULL;
        pthread_cond_broadcast(&hasher->changed);
    }
    pthread_mutex_unlock(&hasher->mutex);
    return NULL;
}

/* After this crc and digest are the caller's. */
static void hasher_wait(struct hasher *hasher)
{
    if (!hasher->started)
        return;
    pthread_mutex_lock(&hasher->mutex);
    while (hasher->data)
        pthread_cond_wait(&hasher->changed, &hasher->mutex);
    pthread_mutex_unlock(&hasher->mutex);
}

/* Signals are for the program's own threads. */
static void hasher_start(struct hasher *hasher)
{
    sigset_t all, before;

    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    hasher->started = pthread_create(&hasher->thread, NULL, hasher_main, hasher) == 0;
    hasher->refused = !hasher->started;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

/* True when the thread has it: `data` must stay as it is until the next call of wait or give. */
static bool hasher_give(struct hasher *hasher, const uint8_t *data, uint32_t bytes)
{
    if (!hasher->started && !hasher->refused)
        hasher_start(hasher);
    hasher_wait(hasher);
    if (!hasher->started) {
        hash(hasher, data, bytes);
        return false;
    }
    pthread_mutex_lock(&hasher->mutex);
    hasher->bytes = bytes;
    hasher->data = data;
    pthread_cond_broadcast(&hasher->changed);
    pthread_mutex_unlock(&hasher->mutex);
    return true;
}

static void hasher_stop(struct hasher *hasher)
{
    if (!hasher->started)
        return;
    pthread_mutex_lock(&hasher->mutex);
    hasher->stop = true;
    pthread_cond_broadcast(&hasher->changed);
    pthread_mutex_unlock(&hasher->mutex);
    pthread_join(hasher->thread, NULL);
    hasher->started = false;
}

static bool section_name_is_valid(const char *name)
{
    size_t bytes = strlen(name);

    if (bytes == 0 || bytes >= SECTION_NAME_MAX || name[0] == '.' ||
        strcmp(name, MANIFEST_NAME) == 0)
        return false;
    return strspn(name, "abcdefghijklmnopqrstuvwxyz0123456789._-") == bytes;
}

/* Everything after a failure fails; the first error has told why. */
static int alive(const struct segment_writer *writer, struct error *err)
{
    if (writer->failed || writer->published)
        return error_set(err, ERR_INVALID, "%s: this writer has %s", writer->tmp_path,
                         writer->failed ? "failed before" : "published already");
    return 0;
}

static int usable(const struct segment_writer *writer, bool section_open, struct error *err)
{
    if (alive(writer, err) < 0)
        return -1;
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

    hasher_wait(&writer->hasher);
    if (writer->file)
        rc = file_close(writer->file, writer->file_path, err);
    writer->file = NULL;
    if (writer->hasher.digest)
        digest_finish(writer->hasher.digest, unused);
    writer->hasher.digest = NULL;
    for (uint32_t i = 0; i < 2; i++) {
        free(writer->runs[i]);
        writer->runs[i] = NULL;
    }
    writer->run = NULL;
    return rc;
}

/* A writer that has touched nothing yet. ERR_EXISTS when `path` is there. */
static int writer_new(struct vfs *vfs, const char *path, const uint8_t id[DIGEST_BYTES],
                      uint64_t row_count, struct segment_writer **out, struct error *err)
{
    struct segment_writer *writer = calloc(1, sizeof *writer);
    size_t path_bytes = strlen(path);
    int rc = -1;

    while (path_bytes > 1 && path[path_bytes - 1] == '/')
        path_bytes--; /* "seg/" and "seg" are one place, and ".tmp" must go beside it */
    if (writer) {
        pthread_mutex_init(&writer->hasher.mutex, NULL);
        pthread_cond_init(&writer->hasher.changed, NULL);
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
        manifest_set_u64(writer->manifest, "rows", row_count, err) < 0)
        goto done;
    *out = writer;
    writer = NULL;
    rc = 0;
done:
    segment_writer_close(writer);
    return rc;
}

static int start_anew(struct segment_writer *writer, struct error *err)
{
    if (file_remove_all(writer->vfs, writer->tmp_path, err) < 0 ||
        file_mkdir(writer->vfs, writer->tmp_path, err) < 0)
        return -1;
    writer->tmp_made = true;
    return 0;
}

int segment_writer_open(struct vfs *vfs, const char *path, const uint8_t id[DIGEST_BYTES],
                        uint64_t row_count, struct segment_writer **out, struct error *err)
{
    struct segment_writer *writer = NULL;
    int rc = -1;

    if (writer_new(vfs, path, id, row_count, &writer, err) < 0 || start_anew(writer, err) < 0)
        goto done;
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
    hasher_stop(&writer->hasher);
    pthread_mutex_destroy(&writer->hasher.mutex);
    pthread_cond_destroy(&writer->hasher.changed);
    if (writer->tmp_made && !writer->published && !writer->checkpointed)
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

    snprintf(name, sizeof name, "section.%03" PRIu32 ".%s", writer->section_count, what);
    return manifest_set_u64(writer->manifest, name, value, err);
}

bool segment_writer_has(const struct segment_writer *writer, const char *name)
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

/* CRC of a block's payload; blocks are counted from 1: block 0 is the header. */
static uint32_t block_crc(const struct segment_writer *writer, uint64_t number,
                          const uint8_t *block)
{
    uint8_t bytes[8];

    store_u64(bytes, number);
    return crc32c(crc32c(writer->seed, bytes, sizeof bytes), block,
                  writer->block_bytes - BLOCK_CRC_BYTES);
}

/* Reads back the blocks of writer->left into what a writer of them would know. ERR_CORRUPT and
 * ERR_IO say that they are not to be had. */
static int read_back(struct segment_writer *writer, struct job *job, struct error *err)
{
    const struct part *left = &writer->left;
    uint32_t crc = 0;
    int rc;

    for (uint64_t first = 0; first < left->blocks;) {
        uint64_t at_once = writer->run_capacity / writer->block_bytes;

        if (at_once > left->blocks - first)
            at_once = left->blocks - first;
        if (job_cancelled(job))
            return error_set(err, ERR_CANCELLED, "%s: cancelled", writer->file_path);
        if (file_read_exact(writer->file, writer->file_path, writer->run,
                            at_once * writer->block_bytes, (first + 1) * writer->block_bytes,
                            err) < 0)
            return -1;
        for (uint64_t i = 0; i < at_once; i++) {
            const uint8_t *block = writer->run + i * writer->block_bytes;

            if (load_u32(block + writer->block_bytes - BLOCK_CRC_BYTES) !=
                block_crc(writer, first + i + 1, block))
                return error_set(err, ERR_CORRUPT, "%s: block %" PRIu64 " fails its CRC",
                                 writer->file_path, first + i + 1);
        }
        crc = crc32c(crc, writer->run, at_once * writer->block_bytes);
        first += at_once;
    }
    if (crc != left->crc)
        return error_set(err, ERR_CORRUPT, "%s: the CRC of its blocks is not the checkpoint's",
                         writer->file_path);
    writer->block_count = left->blocks;
    writer->payload_bytes = left->blocks * (writer->block_bytes - BLOCK_CRC_BYTES);
    writer->file_offset = (left->blocks + 1) * writer->block_bytes;
    writer->hasher.crc = crc;
    digest_restore(writer->hasher.digest, left->digest);
    rc = writer->file->vfs->truncate(writer->file, writer->file_offset);
    if (rc < 0)
        return error_set_errno(err, rc, "%s: cannot cut it to %" PRIu64 " bytes", writer->file_path,
                               writer->file_offset);
    return 0;
}

/* Opens the file of writer->left and goes on behind it. Leaves writer->file NULL when the section
 * has to start anew. */
static int take_up(struct segment_writer *writer, struct job *job, struct error *err)
{
    struct error reading = ERROR_INIT;

    writer->file = file_open(writer->vfs, writer->file_path, VFS_WRITE | VFS_DIRECT, &reading);
    if (!writer->file) {
        if (reading.code == ERR_NOT_FOUND)
            return 0;
        return error_set(err, reading.code, "%s", reading.message);
    }
    if (read_back(writer, job, &reading) == 0)
        return 0;
    if (reading.code != ERR_CORRUPT && reading.code != ERR_IO)
        return error_set(err, reading.code, "%s", reading.message);
    file_close(writer->file, writer->file_path, NULL); /* it is about to be removed */
    writer->file = NULL;
    return 0;
}

static int check_begin(const struct segment_writer *writer, const char *name, uint32_t block_bytes,
                       struct error *err)
{
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
    if (segment_writer_has(writer, name))
        return error_set(err, ERR_INVALID, "%s: section %s is there already", writer->tmp_path,
                         name);
    return 0;
}

/* The section's number is part of every block's CRC. */
static uint32_t section_seed(const struct segment_writer *writer)
{
    uint8_t number[4];

    store_u32(number, writer->section_count);
    return crc32c(crc32c(0, writer->id, DIGEST_BYTES), number, sizeof number);
}

/* Where a section without a block is. */
static void at_the_start(struct segment_writer *writer)
{
    writer->payload_bytes = 0;
    writer->block_count = 0;
    writer->file_offset = writer->block_bytes;
    writer->run_bytes = 0;
    writer->block_fill = 0;
    writer->hasher.crc = 0;
}

/* What a checkpoint has of a section that is not taken up. */
static int drop_left(struct segment_writer *writer, struct error *err)
{
    char path[FILE_PATH_MAX];

    if (!writer->left.there)
        return 0;
    writer->left.there = false;
    if (file_path_join(path, writer->tmp_path, writer->left.name, err) < 0)
        return -1;
    return file_remove_all(writer->vfs, path, err);
}

static int begin(struct segment_writer *writer, const char *name, enum section_kind kind,
                 uint32_t block_bytes, bool going_on, struct job *job, struct error *err)
{
    const struct part *left = &writer->left;

    if (check_begin(writer, name, block_bytes, err) < 0 ||
        file_path_join(writer->file_path, writer->tmp_path, name, err) < 0)
        return -1;
    writer->failed = true; /* until all of the below went well */
    memset(writer->name, 0, sizeof writer->name);
    memcpy(writer->name, name, strlen(name));
    writer->kind = kind;
    writer->block_bytes = block_bytes;
    writer->run_capacity =
        block_bytes < RUN_BYTES ? RUN_BYTES / block_bytes * block_bytes : block_bytes;
    writer->seed = section_seed(writer);
    at_the_start(writer);
    for (uint32_t i = 0; i < 2; i++)
        writer->runs[i] = file_buffer_alloc(writer->run_capacity);
    writer->run = writer->runs[0];
    writer->hasher.digest = digest_new();
    if (!writer->runs[0] || !writer->runs[1] || !writer->hasher.digest)
        return error_set(err, ERR_NOMEM, "%s: no memory for two runs of %" PRIu32 " bytes",
                         writer->file_path, writer->run_capacity);
    if (going_on && left->there && strcmp(left->name, name) == 0 && left->kind == (uint32_t)kind &&
        left->block_bytes == block_bytes && take_up(writer, job, err) < 0)
        return -1;
    if (writer->file) {
        writer->left.there = false;
    } else {
        if (drop_left(writer, err) < 0)
            return -1;
        writer->file =
            file_open(writer->vfs, writer->file_path, VFS_WRITE | VFS_CREATE | VFS_DIRECT, err);
        if (!writer->file)
            return -1;
    }
    writer->failed = false;
    return 0;
}

int segment_writer_begin(struct segment_writer *writer, const char *name, enum section_kind kind,
                         uint32_t block_bytes, struct error *err)
{
    return begin(writer, name, kind, block_bytes, false, NULL, err);
}

int segment_writer_begin_at(struct segment_writer *writer, const char *name, enum section_kind kind,
                            uint32_t block_bytes, struct job *job, uint64_t *payload_bytes,
                            struct error *err)
{
    if (begin(writer, name, kind, block_bytes, true, job, err) < 0)
        return -1;
    *payload_bytes = writer->payload_bytes;
    return 0;
}

/* Writes the full blocks of the run and hashes them. */
static int write_run(struct segment_writer *writer, struct error *err)
{
    uint32_t bytes = writer->run_bytes;
    bool given = false;

    if (bytes == 0)
        return 0;
    if (bytes == writer->run_capacity) {
        given = hasher_give(&writer->hasher, writer->run, bytes);
    } else {
        hasher_wait(&writer->hasher);
        hash(&writer->hasher, writer->run, bytes);
    }
    if (file_write_full(writer->file, writer->file_path, writer->run, bytes, writer->file_offset,
                        err) < 0)
        return -1;
    writer->file_offset += bytes;
    writer->run_bytes = 0;
    if (given)
        writer->run = writer->runs[writer->run == writer->runs[0]];
    return 0;
}

/* Closes the block being filled: zeros to its end, then its CRC. */
static int finish_block(struct segment_writer *writer, struct error *err)
{
    uint8_t *block = writer->run + writer->run_bytes;
    uint32_t payload = writer->block_bytes - BLOCK_CRC_BYTES;

    memset(block + writer->block_fill, 0, payload - writer->block_fill);
    store_u32(block + payload, block_crc(writer, writer->block_count, block));
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

/* The header block of section `number`, without the zeros after it. */
static void make_header(const struct segment_writer *writer, uint32_t number, const char *name,
                        uint32_t kind, uint32_t block_bytes, uint64_t file_bytes,
                        struct section_header *header)
{
    memset(header, 0, sizeof *header);
    memcpy(header->magic, SECTION_MAGIC, sizeof header->magic);
    header->version = SECTION_VERSION;
    header->file_bytes = file_bytes;
    header->kind = kind;
    header->number = number;
    header->block_bytes = block_bytes;
    memcpy(header->segment_id, writer->id, DIGEST_BYTES);
    memcpy(header->name, name, strlen(name));
    header->crc32c = crc32c(0, header, sizeof *header);
}

int segment_writer_end(struct segment_writer *writer, struct error *err)
{
    uint8_t sha256[DIGEST_BYTES];
    struct section_header header;
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
    hasher_wait(&writer->hasher);
    make_header(writer, writer->section_count, writer->name, writer->kind, writer->block_bytes,
                writer->file_offset, &header);
    memset(writer->run, 0, writer->block_bytes);
    memcpy(writer->run, &header, sizeof header);
    crc = crc32c(0, writer->run, writer->block_bytes);
    crc = crc32c_combine(crc, writer->hasher.crc, body_bytes);
    digest_update(writer->hasher.digest, writer->run, writer->block_bytes);
    digest_finish(writer->hasher.digest, sha256);
    writer->hasher.digest = NULL;
    if (file_write_full(writer->file, writer->file_path, writer->run, writer->block_bytes, 0, err) <
            0 ||
        file_sync(writer->file, writer->file_path, err) < 0 || section_release(writer, err) < 0)
        return -1;
    snprintf(entry, sizeof entry, "section.%03" PRIu32 ".name", writer->section_count);
    if (manifest_set_text(writer->manifest, entry, writer->name, err) < 0)
        return -1;
    snprintf(entry, sizeof entry, "section.%03" PRIu32 ".sha256", writer->section_count);
    if (section_set_u64(writer, "kind", writer->kind, err) < 0 ||
        section_set_u64(writer, "block_bytes", writer->block_bytes, err) < 0 ||
        section_set_u64(writer, "payload_bytes", writer->payload_bytes, err) < 0 ||
        section_set_u64(writer, "file_bytes", writer->file_offset, err) < 0 ||
        section_set_u64(writer, "crc32c", crc, err) < 0 ||
        manifest_set_bytes(writer->manifest, entry, sha256, sizeof sha256, err) < 0)
        return -1;
    writer->section_count++;
    writer->failed = false;
    return 0;
}

/* Puts the manifest as it is under `name`, with one rename; durable only with `durable`. */
static int write_manifest(struct segment_writer *writer, const char *name, bool durable,
                          struct error *err)
{
    char path[FILE_PATH_MAX], aside[FILE_PATH_MAX];
    struct vfs_file *file = NULL;
    uint8_t *data = NULL;
    size_t bytes = 0;
    int rc = -1;

    if (file_path_join(path, writer->tmp_path, name, err) < 0 ||
        file_path_join(aside, writer->tmp_path, ASIDE_NAME, err) < 0 ||
        manifest_encode(writer->manifest, &data, &bytes, err) < 0 ||
        file_remove_all(writer->vfs, aside, err) < 0)
        goto done;
    file = file_open(writer->vfs, aside, VFS_WRITE | VFS_CREATE, err);
    if (!file || file_write_full(file, aside, data, bytes, 0, err) < 0 ||
        (durable && file_sync(file, aside, err) < 0))
        goto done;
    rc = 0;
done:
    if (file_close(file, aside, err) < 0)
        rc = -1;
    free(data);
    if (rc == 0)
        rc = file_rename(writer->vfs, aside, path, err);
    if (rc == 0 && durable)
        rc = file_dirsync(writer->vfs, writer->tmp_path, err);
    return rc;
}

static const char *const part_entries[] = {"checkpoint.name",        "checkpoint.kind",
                                           "checkpoint.block_bytes", "checkpoint.blocks",
                                           "checkpoint.crc32c",      "checkpoint.digest"};

/* Takes the part out of a manifest, which then is one of whole sections. */
static void remove_part(struct manifest *manifest)
{
    for (size_t i = 0; i < sizeof part_entries / sizeof part_entries[0]; i++)
        manifest_remove(manifest, part_entries[i]);
}

static int add_part(struct manifest *manifest, const struct part *part, struct error *err)
{
    if (manifest_set_text(manifest, part_entries[0], part->name, err) < 0 ||
        manifest_set_u64(manifest, part_entries[1], part->kind, err) < 0 ||
        manifest_set_u64(manifest, part_entries[2], part->block_bytes, err) < 0 ||
        manifest_set_u64(manifest, part_entries[3], part->blocks, err) < 0 ||
        manifest_set_u64(manifest, part_entries[4], part->crc, err) < 0 ||
        manifest_set_bytes(manifest, part_entries[5], part->digest, DIGEST_STATE_BYTES, err) < 0)
        return -1;
    return 0;
}

/* Makes the whole sections and the part durable. */
static int write_checkpoint(struct segment_writer *writer, const struct part *part,
                            struct error *err)
{
    char folder[FILE_PATH_MAX];
    int rc = -1;

    if (part->there && add_part(writer->manifest, part, err) < 0)
        goto done;
    if (write_manifest(writer, CHECKPOINT_NAME, true, err) < 0)
        goto done;
    if (!writer->folder_durable) {
        file_path_folder(folder, writer->tmp_path);
        if (file_dirsync(writer->vfs, folder, err) < 0)
            goto done;
        writer->folder_durable = true;
    }
    rc = 0;
done:
    remove_part(writer->manifest);
    return rc;
}

int segment_writer_checkpoint(struct segment_writer *writer, uint64_t *payload_bytes,
                              struct error *err)
{
    struct part part = writer->left; /* as good as it was while its section is not begun */

    if (alive(writer, err) < 0)
        return -1;
    writer->failed = true;
    if (writer->file) {
        const uint8_t *begun = writer->run + writer->run_bytes;

        if (write_run(writer, err) < 0)
            return -1;
        memmove(writer->run, begun, writer->block_fill); /* to where the next run starts */
        hasher_wait(&writer->hasher);
        if (file_sync(writer->file, writer->file_path, err) < 0)
            return -1;
        part = (struct part){.there = true,
                             .kind = writer->kind,
                             .block_bytes = writer->block_bytes,
                             .blocks = writer->file_offset / writer->block_bytes - 1,
                             .crc = writer->hasher.crc};
        memcpy(part.name, writer->name, sizeof part.name);
        digest_save(writer->hasher.digest, part.digest);
    }
    if (write_checkpoint(writer, &part, err) < 0)
        return -1;
    if (payload_bytes)
        *payload_bytes = writer->file ? part.blocks * (part.block_bytes - BLOCK_CRC_BYTES) : 0;
    writer->checkpointed = true;
    writer->failed = false;
    return 0;
}

/* The manifest of that name in the folder an earlier writer left; NULL when it is of no use. */
static int read_left_manifest(const struct segment_writer *writer, const char *name,
                              struct manifest **out, struct error *err)
{
    struct manifest *manifest = NULL;
    struct error reading = ERROR_INIT;
    char path[FILE_PATH_MAX];
    uint64_t rows, wanted_rows;
    const uint8_t *id;
    size_t id_bytes;
    int rc = -1;

    *out = NULL;
    if (file_path_join(path, writer->tmp_path, name, err) < 0 ||
        manifest_get_u64(writer->manifest, "rows", &wanted_rows, err) < 0)
        goto done;
    if (manifest_read(writer->vfs, MANIFEST_SEGMENT, path, &manifest, &reading) < 0 &&
        reading.code != ERR_NOT_FOUND && reading.code != ERR_CORRUPT &&
        reading.code != ERR_UNSUPPORTED) {
        error_set(err, reading.code, "%s", reading.message);
        goto done;
    }
    rc = 0;
    if (manifest && manifest_get_bytes(manifest, "id", &id, &id_bytes, NULL) == 0 &&
        id_bytes == DIGEST_BYTES && memcmp(id, writer->id, DIGEST_BYTES) == 0 &&
        manifest_get_u64(manifest, "rows", &rows, NULL) == 0 && rows == wanted_rows) {
        *out = manifest;
        manifest = NULL;
    }
done:
    manifest_free(manifest);
    return rc;
}

/* A file an earlier writer left, of that many bytes at least. 1 yes, 0 no. */
static int file_is_left(const struct segment_writer *writer, const char *path, uint64_t bytes,
                        uint64_t *file_bytes, struct error *err)
{
    struct error reading = ERROR_INIT;
    struct vfs_stat st;

    if (file_stat(writer->vfs, path, &st, &reading) < 0) {
        if (reading.code == ERR_NOT_FOUND)
            return 0;
        return error_set(err, reading.code, "%s", reading.message);
    }
    *file_bytes = st.bytes;
    return st.kind == VFS_FILE && st.bytes >= bytes;
}

/* Whether the file begins with the header it must have. 1 yes, 0 no. */
static int header_is_there(const struct segment_writer *writer, const char *path,
                           const struct section_header *wanted, struct error *err)
{
    struct error reading = ERROR_INIT;
    struct vfs_file *file = NULL;
    uint8_t *block = NULL;
    int rc = -1;

    block = file_buffer_alloc(FILE_BLOCK_BYTES);
    if (!block) {
        error_set(err, ERR_NOMEM, "%s: no memory for a block", path);
        goto done;
    }
    file = file_open(writer->vfs, path, VFS_READ | VFS_DIRECT, err);
    if (!file)
        goto done;
    if (file_read_exact(file, path, block, FILE_BLOCK_BYTES, 0, &reading) == 0)
        rc = memcmp(block, wanted, sizeof *wanted) == 0;
    else if (reading.code == ERR_CORRUPT || reading.code == ERR_IO)
        rc = 0;
    else
        error_set(err, reading.code, "%s", reading.message);
done:
    file_close(file, path, NULL);
    free(block);
    return rc;
}

/* Whether section `number` of a manifest that was left is whole. 1 yes, 0 no. */
static int section_is_left(const struct segment_writer *writer, const struct manifest *manifest,
                           uint32_t number, struct error *err)
{
    static const char *const whats[] = {"kind", "block_bytes", "file_bytes"};
    struct section_header header;
    char entry[64], path[FILE_PATH_MAX];
    uint64_t values[3], file_bytes = 0;
    const char *name;
    int rc;

    snprintf(entry, sizeof entry, "section.%03" PRIu32 ".name", number);
    if (!manifest_has(manifest, entry) || manifest_get_text(manifest, entry, &name, NULL) < 0 ||
        !section_name_is_valid(name))
        return 0;
    for (uint32_t i = 0; i < 3; i++) {
        snprintf(entry, sizeof entry, "section.%03" PRIu32 ".%s", number, whats[i]);
        if (manifest_get_u64_in(manifest, entry, 1, i < 2 ? UINT32_MAX : INT64_MAX, &values[i],
                                NULL) < 0)
            return 0;
    }
    if (file_path_join(path, writer->tmp_path, name, err) < 0)
        return -1;
    rc = file_is_left(writer, path, values[2], &file_bytes, err);
    if (rc <= 0 || file_bytes != values[2])
        return rc < 0 ? -1 : 0;
    make_header(writer, number, name, (uint32_t)values[0], (uint32_t)values[1], values[2], &header);
    return header_is_there(writer, path, &header, err);
}

/* How many sections from the first on are whole; 0 without a manifest. */
static int count_left(const struct segment_writer *writer, const struct manifest *manifest,
                      uint32_t *count, struct error *err)
{
    int rc = 1;

    *count = 0;
    while (manifest && *count < SECTION_COUNT_MAX) {
        rc = section_is_left(writer, manifest, *count, err);
        if (rc <= 0)
            break;
        ++*count;
    }
    return rc < 0 ? -1 : 0;
}

/* Forgets the sections from `count` on. *dropped: whether there was one. */
static void forget_sections(struct manifest *manifest, uint32_t count, bool *dropped)
{
    static const char *const whats[] = {"kind",   "block_bytes", "payload_bytes", "file_bytes",
                                        "crc32c", "sha256",      "name"};
    char entry[64];

    *dropped = false;
    for (uint32_t i = count; i < SECTION_COUNT_MAX; i++) {
        snprintf(entry, sizeof entry, "section.%03" PRIu32 ".name", i);
        if (!manifest_has(manifest, entry))
            break;
        *dropped = true;
        for (size_t w = 0; w < sizeof whats / sizeof whats[0]; w++) {
            snprintf(entry, sizeof entry, "section.%03" PRIu32 ".%s", i, whats[w]);
            manifest_remove(manifest, entry);
        }
    }
}

/* Reads the part that a checkpoint has of the section after the whole ones; none when it makes no
 * sense or its file is too short. */
static int find_part(const struct segment_writer *writer, const struct manifest *manifest,
                     struct part *part, struct error *err)
{
    uint64_t kind, block_bytes, blocks, crc, file_bytes;
    char path[FILE_PATH_MAX];
    const uint8_t *digest;
    size_t digest_bytes;
    const char *name;
    int rc;

    memset(part, 0, sizeof *part);
    if (!manifest_has(manifest, part_entries[0]) ||
        manifest_get_text(manifest, part_entries[0], &name, NULL) < 0 ||
        !section_name_is_valid(name) ||
        manifest_get_u64_in(manifest, part_entries[1], 0, UINT32_MAX, &kind, NULL) < 0 ||
        manifest_get_u64_in(manifest, part_entries[2], FILE_BLOCK_BYTES, SECTION_BLOCK_BYTES_MAX,
                            &block_bytes, NULL) < 0 ||
        manifest_get_u64_in(manifest, part_entries[3], 0, INT64_MAX / SECTION_BLOCK_BYTES_MAX - 1,
                            &blocks, NULL) < 0 ||
        manifest_get_u64_in(manifest, part_entries[4], 0, UINT32_MAX, &crc, NULL) < 0 ||
        manifest_get_bytes(manifest, part_entries[5], &digest, &digest_bytes, NULL) < 0 ||
        digest_bytes != DIGEST_STATE_BYTES)
        return 0;
    if (file_path_join(path, writer->tmp_path, name, err) < 0)
        return -1;
    rc = file_is_left(writer, path, (blocks + 1) * block_bytes, &file_bytes, err);
    if (rc <= 0)
        return rc;
    part->there = true;
    memcpy(part->name, name, strlen(name));
    part->kind = (uint32_t)kind;
    part->block_bytes = (uint32_t)block_bytes;
    part->blocks = blocks;
    part->crc = (uint32_t)crc;
    memcpy(part->digest, digest, DIGEST_STATE_BYTES);
    return 0;
}

/* Removes from the folder what is neither the checkpoint nor in it. */
static int remove_the_rest(struct segment_writer *writer, struct error *err)
{
    char path[FILE_PATH_MAX];
    char **names = NULL;
    uint32_t count = 0;
    int rc = file_list(writer->vfs, writer->tmp_path, &names, &count, err);

    for (uint32_t i = 0; i < count && rc == 0; i++) {
        if (strcmp(names[i], CHECKPOINT_NAME) == 0 || segment_writer_has(writer, names[i]) ||
            (writer->left.there && strcmp(writer->left.name, names[i]) == 0))
            continue;
        rc = file_path_join(path, writer->tmp_path, names[i], err);
        if (rc == 0)
            rc = file_remove_all(writer->vfs, path, err);
    }
    file_names_free(names, count);
    return rc;
}

/* Takes over what an earlier writer left. Leaves writer->tmp_made false when that is nothing. */
static int adopt(struct segment_writer *writer, struct error *err)
{
    struct manifest *checkpoint = NULL, *manifest = NULL;
    uint32_t in_checkpoint, in_manifest;
    bool dropped;
    int rc = -1;

    if (read_left_manifest(writer, CHECKPOINT_NAME, &checkpoint, err) < 0 ||
        read_left_manifest(writer, MANIFEST_NAME, &manifest, err) < 0 ||
        count_left(writer, checkpoint, &in_checkpoint, err) < 0 ||
        count_left(writer, manifest, &in_manifest, err) < 0)
        goto done;
    if (!checkpoint && in_manifest == 0) {
        rc = 0;
        goto done;
    }
    manifest_free(writer->manifest);
    if (!checkpoint || in_manifest > in_checkpoint) {
        writer->manifest = manifest;
        writer->section_count = in_manifest;
        manifest = NULL;
    } else {
        writer->manifest = checkpoint;
        writer->section_count = in_checkpoint;
        checkpoint = NULL;
    }
    forget_sections(writer->manifest, writer->section_count, &dropped);
    if (!dropped && find_part(writer, writer->manifest, &writer->left, err) < 0)
        goto done;
    remove_part(writer->manifest);
    if (writer->left.there && segment_writer_has(writer, writer->left.name))
        writer->left.there = false;
    if (write_checkpoint(writer, &writer->left, err) < 0 || remove_the_rest(writer, err) < 0)
        goto done;
    writer->tmp_made = true;
    writer->checkpointed = true;
    rc = 0;
done:
    manifest_free(checkpoint);
    manifest_free(manifest);
    return rc;
}

int segment_writer_resume(struct vfs *vfs, const char *path, const uint8_t id[DIGEST_BYTES],
                          uint64_t row_count, struct segment_writer **out, struct error *err)
{
    struct segment_writer *writer = NULL;
    struct error looking = ERROR_INIT;
    struct vfs_stat st;
    int rc = -1;

    if (writer_new(vfs, path, id, row_count, &writer, err) < 0)
        goto done;
    if (file_stat(vfs, writer->tmp_path, &st, &looking) < 0) {
        if (looking.code != ERR_NOT_FOUND) {
            error_set(err, looking.code, "%s", looking.message);
            goto done;
        }
    } else if (st.kind == VFS_DIRECTORY && adopt(writer, err) < 0) {
        goto done;
    }
    if (!writer->tmp_made && start_anew(writer, err) < 0)
        goto done;
    *out = writer;
    writer = NULL;
    rc = 0;
done:
    segment_writer_close(writer);
    return rc;
}

int segment_writer_preview(struct segment_writer *writer, struct error *err)
{
    if (usable(writer, false, err) < 0)
        return -1;
    writer->failed = true;
    if (write_manifest(writer, MANIFEST_NAME, false, err) < 0)
        return -1;
    writer->failed = false;
    return 0;
}

const char *segment_writer_folder(const struct segment_writer *writer)
{
    return writer->tmp_path;
}

int segment_writer_publish(struct segment_writer *writer, struct error *err)
{
    char folder[FILE_PATH_MAX], path[FILE_PATH_MAX];

    if (usable(writer, false, err) < 0)
        return -1;
    writer->failed = true;
    file_path_folder(folder, writer->path);
    if (write_manifest(writer, MANIFEST_NAME, true, err) < 0)
        return -1;
    if (writer->checkpointed) {
        /* From here on segment.manifest is what a kill leaves to resume from. */
        if (file_path_join(path, writer->tmp_path, CHECKPOINT_NAME, err) < 0 ||
            file_remove_all(writer->vfs, path, err) < 0 || drop_left(writer, err) < 0 ||
            file_dirsync(writer->vfs, writer->tmp_path, err) < 0)
            return -1;
    }
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
