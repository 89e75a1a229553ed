/* How it works: opening reads segment.manifest (its CRC covers all of it), derives from every
 * section's payload length what its file length must be, compares that with the manifest and with
 * the file itself, and checks the header block byte for byte. After that a block's place is plain
 * arithmetic on numbers that were checked, and what a read returns is believed only after
 * segment_block_check().
 *
 * A burst of spans is cut into pieces of whole blocks; pieces that touch or overlap become one run,
 * and each run is one read. At most the reader's depth of runs, and IN_FLIGHT_BYTES of buffers, are
 * under way. */
#include "storage/segment.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "storage/base/bytes.h"
#include "storage/file.h"
#include "storage/format.h"

#define RUN_BYTES (1u << 20)        /* one plain read, one read of a burst */
#define IN_FLIGHT_BYTES (16u << 20) /* buffers of one burst, unless a single run is larger */

struct segment {
    struct vfs *vfs;
    char *path;
    struct manifest *manifest;
    uint8_t id[DIGEST_BYTES];
    uint64_t row_count;
    uint32_t section_count;
    struct segment_section *sections;
    uint32_t *seeds; /* per section: CRC of segment id and section number */
};

static uint32_t payload_of(const struct segment_section *section)
{
    return section->block_bytes - BLOCK_CRC_BYTES;
}

static int get_section_u64(const struct segment *segment, uint32_t number, const char *what,
                           uint64_t min, uint64_t max, uint64_t *value, struct error *err)
{
    char name[64];

    snprintf(name, sizeof name, "section.%03" PRIu32 ".%s", number, what);
    return manifest_get_u64_in(segment->manifest, name, min, max, value, err);
}

/* A name becomes part of a path: it must not leave the folder. */
static int check_section_name(const struct segment *segment, uint32_t number, const char *name,
                              struct error *err)
{
    size_t bytes = strlen(name);

    if (bytes == 0 || bytes >= SECTION_NAME_MAX || name[0] == '.' ||
        strspn(name, "abcdefghijklmnopqrstuvwxyz0123456789._-") != bytes ||
        strcmp(name, "segment.manifest") == 0)
        return error_set(err, ERR_CORRUPT,
                         "%s/segment.manifest: section %" PRIu32 " has the unusable name \"%.40s\"",
                         segment->path, number, name);
    for (uint32_t i = 0; i < number; i++) {
        if (strcmp(segment->sections[i].name, name) == 0)
            return error_set(err, ERR_CORRUPT,
                             "%s/segment.manifest: sections %" PRIu32 " and %" PRIu32
                             " are both named %s",
                             segment->path, i, number, name);
    }
    return 0;
}

/* Fills in what segment.manifest says of one section, and checks that the sizes agree. */
static int read_section_entries(struct segment *segment, uint32_t number, struct error *err)
{
    struct segment_section *section = &segment->sections[number];
    uint64_t kind, block_bytes, wanted;
    char entry[64], path[FILE_PATH_MAX];
    const char *name;

    snprintf(entry, sizeof entry, "section.%03" PRIu32 ".name", number);
    if (manifest_get_text(segment->manifest, entry, &name, err) < 0 ||
        check_section_name(segment, number, name, err) < 0 ||
        get_section_u64(segment, number, "kind", 1, UINT32_MAX, &kind, err) < 0 ||
        get_section_u64(segment, number, "block_bytes", FILE_BLOCK_BYTES, SECTION_BLOCK_BYTES_MAX,
                        &block_bytes, err) < 0 ||
        get_section_u64(segment, number, "payload_bytes", 0, INT64_MAX, &section->payload_bytes,
                        err) < 0 ||
        get_section_u64(segment, number, "file_bytes", 0, INT64_MAX, &section->file_bytes, err) <
            0 ||
        file_path_join(path, segment->path, name, err) < 0)
        return -1;
    memcpy(section->name, name, strlen(name));
    section->path = strdup(path);
    if (!section->path)
        return error_set(err, ERR_NOMEM, "%s: no memory", path);
    section->kind = (enum section_kind)kind;
    section->number = number;
    section->block_bytes = (uint32_t)block_bytes;
    if (block_bytes % FILE_BLOCK_BYTES != 0)
        return error_set(err, ERR_CORRUPT, "%s: blocks of %" PRIu64 " bytes, no multiple of %u",
                         path, block_bytes, FILE_BLOCK_BYTES);
    section->block_count = section->payload_bytes / payload_of(section) +
                           (section->payload_bytes % payload_of(section) != 0);
    if (!size_mul(section->block_count + 1, block_bytes, &wanted) || wanted != section->file_bytes)
        return error_set(err, ERR_CORRUPT,
                         "%s: segment.manifest says %" PRIu64 " bytes of file for %" PRIu64
                         " bytes of payload in blocks of %" PRIu64,
                         path, section->file_bytes, section->payload_bytes, block_bytes);
    return 0;
}

/* Compares one field of the header with what segment.manifest makes it. */
static int check_field(const struct segment_section *section, const char *what, uint64_t found,
                       uint64_t wanted, struct error *err)
{
    if (found != wanted)
        return error_set(err, ERR_CORRUPT,
                         "%s: the header says %s %" PRIu64 ", segment.manifest says %" PRIu64,
                         section->path, what, found, wanted);
    return 0;
}

static int check_header(const struct segment *segment, const struct segment_section *section,
                        const uint8_t *block, struct error *err)
{
    struct section_header header;
    uint32_t crc;

    memcpy(&header, block, sizeof header);
    if (memcmp(header.magic, SECTION_MAGIC, sizeof header.magic) != 0)
        return error_set(err, ERR_CORRUPT, "%s: does not start with \"%s\"", section->path,
                         SECTION_MAGIC);
    if (header.version != SECTION_VERSION)
        return error_set(err, ERR_UNSUPPORTED,
                         "%s: format version %" PRIu32 ", this program reads version %u",
                         section->path, header.version, SECTION_VERSION);
    crc = header.crc32c;
    header.crc32c = 0;
    if (crc32c(0, &header, sizeof header) != crc)
        return error_set(err, ERR_CORRUPT,
                         "%s: CRC-32C of the header is %08" PRIx32 ", it says %08" PRIx32,
                         section->path, crc32c(0, &header, sizeof header), crc);
    if (header.features_incompat != 0)
        return error_set(err, ERR_UNSUPPORTED,
                         "%s: needs features %08" PRIx32 " this program does not know",
                         section->path, header.features_incompat);
    if (check_field(section, "file bytes", header.file_bytes, section->file_bytes, err) < 0 ||
        check_field(section, "kind", header.kind, section->kind, err) < 0 ||
        check_field(section, "number", header.number, section->number, err) < 0 ||
        check_field(section, "block bytes", header.block_bytes, section->block_bytes, err) < 0)
        return -1;
    if (memcmp(header.segment_id, segment->id, DIGEST_BYTES) != 0)
        return error_set(err, ERR_CORRUPT, "%s: the file belongs to another segment",
                         section->path);
    if (memcmp(header.name, section->name, sizeof header.name) != 0)
        return error_set(err, ERR_CORRUPT, "%s: the header names section \"%.31s\"", section->path,
                         header.name);
    memset(&header.magic, 0, offsetof(struct section_header, reserved_a));
    memset(header.segment_id, 0, sizeof header.segment_id);
    memset(header.name, 0, sizeof header.name);
    for (size_t i = 0; i < section->block_bytes; i++) {
        uint8_t byte = i < sizeof header ? ((const uint8_t *)&header)[i] : block[i];

        if (byte != 0)
            return error_set(err, ERR_CORRUPT, "%s: reserved byte %zu is not zero", section->path,
                             i);
    }
    return 0;
}

static int open_section(struct segment *segment, uint32_t number, struct error *err)
{
    struct segment_section *section = &segment->sections[number];
    uint8_t number_bytes[4];
    uint8_t *block = NULL;
    uint64_t bytes;
    int rc = -1;

    if (read_section_entries(segment, number, err) < 0)
        goto done;
    store_u32(number_bytes, number);
    segment->seeds[number] =
        crc32c(crc32c(0, segment->id, DIGEST_BYTES), number_bytes, sizeof number_bytes);
    section->file = file_open(segment->vfs, section->path, VFS_READ | VFS_DIRECT, err);
    if (!section->file || file_size(section->file, section->path, &bytes, err) < 0)
        goto done;
    if (bytes != section->file_bytes) {
        error_set(err, ERR_CORRUPT,
                  "%s: the file has %" PRIu64 " bytes, segment.manifest says %" PRIu64,
                  section->path, bytes, section->file_bytes);
        goto done;
    }
    block = file_buffer_alloc(section->block_bytes);
    if (!block) {
        error_set(err, ERR_NOMEM, "%s: no memory for a block", section->path);
        goto done;
    }
    if (file_read_exact(section->file, section->path, block, section->block_bytes, 0, err) < 0)
        goto done;
    rc = check_header(segment, section, block, err);
done:
    free(block);
    return rc;
}

static int read_identity(struct segment *segment, struct error *err)
{
    const uint8_t *id;
    size_t id_bytes;

    if (manifest_get_bytes(segment->manifest, "id", &id, &id_bytes, err) < 0)
        return -1;
    if (id_bytes != DIGEST_BYTES)
        return error_set(err, ERR_CORRUPT, "%s/segment.manifest: the id has %zu bytes, wanted %u",
                         segment->path, id_bytes, DIGEST_BYTES);
    memcpy(segment->id, id, DIGEST_BYTES);
    return manifest_get_u64(segment->manifest, "rows", &segment->row_count, err);
}

/* Sections are numbered from 0 without gaps; anything else named section.* belongs to none. */
static int count_sections(struct segment *segment, struct error *err)
{
    uint32_t count = 0;
    uint32_t names = 0;
    char entry[64];

    for (;; count++) {
        snprintf(entry, sizeof entry, "section.%03" PRIu32 ".name", count);
        if (!manifest_has(segment->manifest, entry))
            break;
        if (count == SECTION_COUNT_MAX)
            return error_set(err, ERR_CORRUPT, "%s/segment.manifest: more than %u sections",
                             segment->path, SECTION_COUNT_MAX);
    }
    for (uint32_t i = 0; i < manifest_count(segment->manifest); i++) {
        const char *name = manifest_entry(segment->manifest, i, NULL, 0);
        size_t bytes = strlen(name);

        if (strncmp(name, "section.", 8) == 0 && bytes > 5 &&
            strcmp(name + bytes - 5, ".name") == 0)
            names++;
    }
    if (names != count)
        return error_set(err, ERR_CORRUPT,
                         "%s/segment.manifest: section %" PRIu32 " of %" PRIu32 " is missing",
                         segment->path, count, names);
    segment->section_count = count;
    return 0;
}

int segment_open(struct vfs *vfs, const char *path, struct segment **out, struct error *err)
{
    struct segment *segment = calloc(1, sizeof *segment);
    struct error read_err = ERROR_INIT;
    char manifest_path[FILE_PATH_MAX];
    int rc = -1;

    if (!segment || !(segment->path = strdup(path))) {
        error_set(err, ERR_NOMEM, "%s: no memory for a segment", path);
        goto done;
    }
    segment->vfs = vfs;
    if (file_path_join(manifest_path, path, "segment.manifest", err) < 0)
        goto done;
    if (manifest_read(vfs, MANIFEST_SEGMENT, manifest_path, &segment->manifest, &read_err) < 0) {
        if (read_err.code == ERR_NOT_FOUND)
            error_set(err, ERR_NOT_FOUND, "%s is no segment: it has no segment.manifest", path);
        else
            error_set(err, read_err.code, "%s", read_err.message);
        goto done;
    }
    if (read_identity(segment, err) < 0 || count_sections(segment, err) < 0)
        goto done;
    segment->sections = calloc(segment->section_count + 1, sizeof *segment->sections);
    segment->seeds = calloc(segment->section_count + 1, sizeof *segment->seeds);
    if (!segment->sections || !segment->seeds) {
        error_set(err, ERR_NOMEM, "%s: no memory for %" PRIu32 " sections", path,
                  segment->section_count);
        goto done;
    }
    for (uint32_t i = 0; i < segment->section_count; i++) {
        struct error section_err = ERROR_INIT;

        if (open_section(segment, i, &section_err) < 0) {
            /* A manifest without its file is damage, not "no such segment". */
            error_set(err, section_err.code == ERR_NOT_FOUND ? ERR_CORRUPT : section_err.code, "%s",
                      section_err.message);
            goto done;
        }
    }
    *out = segment;
    segment = NULL;
    rc = 0;
done:
    segment_close(segment);
    return rc;
}

void segment_close(struct segment *segment)
{
    if (!segment)
        return;
    for (uint32_t i = 0; segment->sections && i < segment->section_count; i++) {
        file_close(segment->sections[i].file, segment->sections[i].path, NULL);
        free(segment->sections[i].path);
    }
    free(segment->sections);
    free(segment->seeds);
    manifest_free(segment->manifest);
    free(segment->path);
    free(segment);
}

const char *segment_path(const struct segment *segment)
{
    return segment->path;
}

const uint8_t *segment_id(const struct segment *segment)
{
    return segment->id;
}

uint64_t segment_row_count(const struct segment *segment)
{
    return segment->row_count;
}

const struct manifest *segment_manifest(const struct segment *segment)
{
    return segment->manifest;
}

uint32_t segment_section_count(const struct segment *segment)
{
    return segment->section_count;
}

const struct segment_section *segment_section_at(const struct segment *segment, uint32_t i)
{
    return i < segment->section_count ? &segment->sections[i] : NULL;
}

const struct segment_section *segment_find(const struct segment *segment, const char *name)
{
    for (uint32_t i = 0; i < segment->section_count; i++) {
        if (strcmp(segment->sections[i].name, name) == 0)
            return &segment->sections[i];
    }
    return NULL;
}

int segment_block_check(const struct segment *segment, const struct segment_section *section,
                        uint64_t block, const uint8_t *data, struct error *err)
{
    uint32_t payload = payload_of(section);
    uint8_t number[8];
    uint32_t crc;

    store_u64(number, block + 1); /* the header is the file's block 0 */
    crc = crc32c(segment->seeds[section->number], number, sizeof number);
    crc = crc32c(crc, data, payload);
    if (crc != load_u32(data + payload))
        return error_set(
            err, ERR_CORRUPT,
            "%s: block at byte %" PRIu64 ": CRC-32C is %08" PRIx32 ", it says %08" PRIx32,
            section->path, segment_block_offset(section, block), crc, load_u32(data + payload));
    return 0;
}

/* Callers ask for ranges that come from records, which come from files. */
static int check_range(const struct segment_section *section, uint64_t offset, uint64_t bytes,
                       struct error *err)
{
    if (offset > section->payload_bytes || bytes > section->payload_bytes - offset)
        return error_set(err, ERR_CORRUPT,
                         "%s: %" PRIu64 " bytes at %" PRIu64 " of a payload of %" PRIu64 " bytes",
                         section->path, bytes, offset, section->payload_bytes);
    return 0;
}

/* Blocks that one read of about RUN_BYTES takes. */
static uint32_t run_blocks(const struct segment_section *section)
{
    return section->block_bytes < RUN_BYTES ? RUN_BYTES / section->block_bytes : 1;
}

/* Copies what payload range [offset, offset + bytes) has in blocks [first, first + count), read
 * into `data`, to its place in `out`. */
static void copy_out(const struct segment_section *section, const uint8_t *data, uint64_t first,
                     uint64_t count, uint64_t offset, uint64_t bytes, uint8_t *out)
{
    uint64_t payload = payload_of(section);

    for (uint64_t i = 0; i < count; i++) {
        uint64_t begin = (first + i) * payload;
        uint64_t end = begin + payload;

        if (begin < offset)
            begin = offset;
        if (end > offset + bytes)
            end = offset + bytes;
        if (begin < end)
            memcpy(out + (begin - offset),
                   data + i * section->block_bytes + (begin - (first + i) * payload), end - begin);
    }
}

int segment_read(const struct segment *segment, const struct segment_section *section,
                 uint64_t offset, uint64_t bytes, void *out, struct error *err)
{
    uint64_t payload = payload_of(section);
    uint8_t *data = NULL;
    uint64_t first, end, at_once;
    int rc = -1;

    if (check_range(section, offset, bytes, err) < 0)
        return -1;
    if (bytes == 0)
        return 0;
    first = offset / payload;
    end = (offset + bytes - 1) / payload + 1;
    at_once = end - first < run_blocks(section) ? end - first : run_blocks(section);
    data = file_buffer_alloc(at_once * section->block_bytes);
    if (!data) {
        error_set(err, ERR_NOMEM, "%s: no memory to read %" PRIu64 " blocks", section->path,
                  at_once);
        goto done;
    }
    for (; first < end; first += at_once) {
        if (at_once > end - first)
            at_once = end - first;
        if (file_read_exact(section->file, section->path, data, at_once * section->block_bytes,
                            segment_block_offset(section, first), err) < 0)
            goto done;
        for (uint64_t i = 0; i < at_once; i++) {
            if (segment_block_check(segment, section, first + i, data + i * section->block_bytes,
                                    err) < 0)
                goto done;
        }
        copy_out(section, data, first, at_once, offset, bytes, out);
    }
    rc = 0;
done:
    free(data);
    return rc;
}

/* Part of a span: whole blocks, few enough for one read. */
struct piece {
    uint64_t first; /* block */
    uint32_t count;
    uint32_t span;
    const struct segment_section *section;
};

/* Pieces [piece_begin, piece_end) of the sorted list lie in its blocks. */
struct run {
    struct reader_read read;
    uint64_t first;
    uint32_t count;
    uint32_t piece_begin;
    uint32_t piece_end;
};

struct burst {
    const struct segment *segment;
    const struct segment_span *spans;
    struct piece *pieces;
    uint32_t piece_count;
    struct run *runs;
    uint32_t run_count;
};

static uint64_t span_first(const struct segment_span *span)
{
    return span->offset / payload_of(span->section);
}

static uint64_t span_end(const struct segment_span *span)
{
    return (span->offset + span->bytes - 1) / payload_of(span->section) + 1;
}

static int order_pieces(const void *a, const void *b)
{
    const struct piece *x = a, *y = b;

    if (x->section->number != y->section->number)
        return x->section->number < y->section->number ? -1 : 1;
    if (x->first != y->first)
        return x->first < y->first ? -1 : 1;
    return x->span < y->span ? -1 : x->span > y->span;
}

static int cut_pieces(struct burst *burst, uint32_t span_count, struct error *err)
{
    uint64_t total = 0;

    for (uint32_t i = 0; i < span_count; i++) {
        const struct segment_span *span = &burst->spans[i];

        if (check_range(span->section, span->offset, span->bytes, err) < 0)
            return -1;
        if (span->bytes > 0)
            total += (span_end(span) - span_first(span) - 1) / run_blocks(span->section) + 1;
    }
    if (total > UINT32_MAX / sizeof *burst->runs)
        return error_set(err, ERR_INVALID, "%s: a burst of %" PRIu64 " reads is too large",
                         burst->segment->path, total);
    burst->pieces = calloc(total + 1, sizeof *burst->pieces);
    burst->runs = calloc(total + 1, sizeof *burst->runs);
    if (!burst->pieces || !burst->runs)
        return error_set(err, ERR_NOMEM, "%s: no memory for a burst of %" PRIu64 " reads",
                         burst->segment->path, total);
    for (uint32_t i = 0; i < span_count; i++) {
        const struct segment_span *span = &burst->spans[i];
        uint32_t at_once = run_blocks(span->section);
        uint64_t first = 0, end = 0;

        if (span->bytes > 0) {
            first = span_first(span);
            end = span_end(span);
        }
        for (; first < end; first += at_once) {
            uint64_t count = end - first < at_once ? end - first : at_once;

            burst->pieces[burst->piece_count++] =
                (struct piece){first, (uint32_t)count, i, span->section};
        }
    }
    return 0;
}

/* Joins pieces whose blocks touch or overlap, as long as one read can hold them. */
static void join_pieces(struct burst *burst)
{
    qsort(burst->pieces, burst->piece_count, sizeof *burst->pieces, order_pieces);
    for (uint32_t i = 0; i < burst->piece_count; i++) {
        const struct piece *piece = &burst->pieces[i];
        struct run *run = burst->run_count ? &burst->runs[burst->run_count - 1] : NULL;

        if (run && burst->pieces[run->piece_begin].section == piece->section &&
            piece->first <= run->first + run->count) {
            uint64_t end = piece->first + piece->count;

            if (end < run->first + run->count)
                end = run->first + run->count;
            if (end - run->first <= run_blocks(piece->section)) {
                run->count = (uint32_t)(end - run->first);
                run->piece_end = i + 1;
                continue;
            }
        }
        burst->runs[burst->run_count++] = (struct run){
            .first = piece->first, .count = piece->count, .piece_begin = i, .piece_end = i + 1};
    }
}

static const struct segment_section *run_section(const struct burst *burst, const struct run *run)
{
    return burst->pieces[run->piece_begin].section;
}

static int prepare_run(struct burst *burst, struct run *run, struct error *err)
{
    const struct segment_section *section = run_section(burst, run);

    run->read.file = section->file;
    run->read.offset = segment_block_offset(section, run->first);
    run->read.bytes = run->count * section->block_bytes;
    run->read.owner = run;
    run->read.buffer = file_buffer_alloc(run->read.bytes);
    if (!run->read.buffer)
        return error_set(err, ERR_NOMEM, "%s: no memory to read %" PRIu32 " blocks", section->path,
                         run->count);
    return 0;
}

static int take_run(struct burst *burst, const struct run *run, struct error *err)
{
    const struct segment_section *section = run_section(burst, run);

    if (run->read.error)
        return error_set_errno(err, run->read.error,
                               "%s: cannot read %" PRIu32 " bytes at %" PRIu64, section->path,
                               run->read.bytes, run->read.offset);
    for (uint32_t i = 0; i < run->count; i++) {
        if (segment_block_check(burst->segment, section, run->first + i,
                                run->read.buffer + (size_t)i * section->block_bytes, err) < 0)
            return -1;
    }
    for (uint32_t i = run->piece_begin; i < run->piece_end; i++) {
        const struct piece *piece = &burst->pieces[i];
        const struct segment_span *span = &burst->spans[piece->span];

        copy_out(section,
                 run->read.buffer + (size_t)(piece->first - run->first) * section->block_bytes,
                 piece->first, piece->count, span->offset, span->bytes, span->out);
    }
    return 0;
}

int segment_read_spans(const struct segment *segment, struct reader *reader,
                       const struct segment_span *spans, uint32_t count, uint64_t *read_count,
                       struct error *err)
{
    struct burst burst = {.segment = segment, .spans = spans};
    struct reader_read *batch[64], *done[64];
    uint64_t bytes_in_flight = 0;
    uint32_t next = 0, got;
    bool failed = false;
    int rc = -1;

    if (reader_in_flight(reader) > 0) {
        error_set(err, ERR_INVALID, "%s: the reader has other reads in flight", segment->path);
        goto done;
    }
    if (cut_pieces(&burst, count, err) < 0)
        goto done;
    join_pieces(&burst);
    while (next < burst.run_count || reader_in_flight(reader) > 0) {
        uint32_t room = reader_depth(reader) - reader_in_flight(reader);
        uint32_t batched = 0;

        while (!failed && next < burst.run_count && batched < room && batched < 64 &&
               (bytes_in_flight == 0 || bytes_in_flight < IN_FLIGHT_BYTES)) {
            struct run *run = &burst.runs[next];

            if (prepare_run(&burst, run, err) < 0) {
                failed = true;
                break;
            }
            bytes_in_flight += run->read.bytes;
            batch[batched++] = &run->read;
            next++;
        }
        /* Reads that could not be handed over come back from reader_wait like the others. */
        if (batched > 0) {
            if (read_count) {
                for (uint32_t i = 0; i < batched; i++)
                    *read_count += batch[i]->bytes / FILE_BLOCK_BYTES;
            }
            if (reader_submit(reader, batch, batched, err) < 0)
                failed = true;
        }
        got = reader_wait(reader, done, 64, true);
        for (uint32_t i = 0; i < got; i++) {
            struct run *run = done[i]->owner;

            if (!failed && take_run(&burst, run, err) < 0)
                failed = true;
            bytes_in_flight -= run->read.bytes;
            free(run->read.buffer);
            run->read.buffer = NULL;
        }
        if (failed && got == 0)
            break; /* nothing left in flight: the buffers are ours again */
    }
    rc = failed ? -1 : 0;
done:
    for (uint32_t i = 0; i < burst.run_count; i++)
        free(burst.runs[i].read.buffer);
    free(burst.runs);
    free(burst.pieces);
    return rc;
}

/* One section: every block's CRC, then CRC-32C and SHA-256 of the file as the writer made them. */
static int check_section(const struct segment *segment, const struct segment_section *section,
                         uint8_t *data, struct job *job, struct error *err)
{
    struct digest *digest = digest_new();
    uint8_t sha256[DIGEST_BYTES];
    const uint8_t *wanted_sha256;
    uint64_t wanted_crc, at_once;
    uint32_t crc, body_crc = 0;
    size_t sha256_bytes;
    char entry[64];
    int rc = -1;

    if (!digest) {
        error_set(err, ERR_NOMEM, "%s: no memory", section->path);
        goto done;
    }
    for (uint64_t first = 0; first < section->block_count; first += at_once) {
        at_once = run_blocks(section);
        if (at_once > section->block_count - first)
            at_once = section->block_count - first;
        if (job_advance(job, at_once * section->block_bytes, err) < 0 ||
            file_read_exact(section->file, section->path, data, at_once * section->block_bytes,
                            segment_block_offset(section, first), err) < 0)
            goto done;
        for (uint64_t i = 0; i < at_once; i++) {
            if (segment_block_check(segment, section, first + i, data + i * section->block_bytes,
                                    err) < 0)
                goto done;
        }
        body_crc = crc32c(body_crc, data, at_once * section->block_bytes);
        digest_update(digest, data, at_once * section->block_bytes);
    }
    if (job_advance(job, section->block_bytes, err) < 0 ||
        file_read_exact(section->file, section->path, data, section->block_bytes, 0, err) < 0 ||
        check_header(segment, section, data, err) < 0)
        goto done;
    crc = crc32c_combine(crc32c(0, data, section->block_bytes), body_crc,
                         section->file_bytes - section->block_bytes);
    digest_update(digest, data, section->block_bytes);
    digest_finish(digest, sha256);
    digest = NULL;
    snprintf(entry, sizeof entry, "section.%03" PRIu32 ".sha256", section->number);
    if (get_section_u64(segment, section->number, "crc32c", 0, UINT32_MAX, &wanted_crc, err) < 0 ||
        manifest_get_bytes(segment->manifest, entry, &wanted_sha256, &sha256_bytes, err) < 0)
        goto done;
    if (crc != wanted_crc) {
        error_set(err, ERR_CORRUPT,
                  "%s: CRC-32C of the file is %08" PRIx32 ", segment.manifest says %08" PRIx32,
                  section->path, crc, (uint32_t)wanted_crc);
        goto done;
    }
    if (sha256_bytes != DIGEST_BYTES || memcmp(sha256, wanted_sha256, DIGEST_BYTES) != 0) {
        error_set(err, ERR_CORRUPT, "%s: SHA-256 is not the one in segment.manifest",
                  section->path);
        goto done;
    }
    rc = 0;
done:
    if (digest)
        digest_finish(digest, sha256);
    return rc;
}

int segment_check(const struct segment *segment, struct job *job, struct error *err)
{
    uint64_t total = 0, largest = FILE_BLOCK_BYTES;
    struct manifest *again = NULL;
    char path[FILE_PATH_MAX];
    uint8_t *data = NULL;
    int rc = -1;

    for (uint32_t i = 0; i < segment->section_count; i++) {
        const struct segment_section *section = &segment->sections[i];
        uint64_t run = (uint64_t)run_blocks(section) * section->block_bytes;

        total += section->file_bytes; /* real files: the sum stays far below 2^64 */
        if (run > largest)
            largest = run;
    }
    data = file_buffer_alloc(largest);
    if (!data) {
        error_set(err, ERR_NOMEM, "%s: no memory to check with", segment->path);
        goto done;
    }
    job_phase(job, "check", total);
    /* What is on the disk now, not what was there when the segment was opened. */
    if (file_path_join(path, segment->path, "segment.manifest", err) < 0 ||
        manifest_read(segment->vfs, MANIFEST_SEGMENT, path, &again, err) < 0)
        goto done;
    for (uint32_t i = 0; i < segment->section_count; i++) {
        if (check_section(segment, &segment->sections[i], data, job, err) < 0)
            goto done;
    }
    rc = 0;
done:
    manifest_free(again);
    free(data);
    return rc;
}
