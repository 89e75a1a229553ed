/* segment: an immutable directory of checked, named sections.
 *
 * A segment holds rows; what its sections mean is for `index` to say. `segment.manifest` names
 * every section file with its length and checksums and carries all parameters; each section file
 * is a run of equal blocks:
 *
 *   block 0       struct section_header (format.h), zero-filled
 *   block 1..n    block_bytes - 4 bytes of payload, then CRC-32C
 *
 * block_bytes is a multiple of 4,096. The CRC of a block starts from the CRC of (segment id,
 * section number, block number), so a block read from the wrong place, or a stale one, fails as
 * surely as a damaged one. Every read verifies. The payload of the section is the concatenation of
 * the blocks' payloads, cut at payload_bytes.
 *
 * An open segment is immutable: any number of threads may read it, each through its own reader. */
#ifndef ANND_STORAGE_SEGMENT_H
#define ANND_STORAGE_SEGMENT_H

#include <stdint.h>

#include "storage/base/digest.h"
#include "storage/base/error.h"
#include "storage/base/job.h"
#include "storage/manifest.h"
#include "storage/reader.h"
#include "storage/vfs.h"

enum section_kind {
    SECTION_PAGES = 1, /* node records, field-wise */
    SECTION_CODES,     /* quantised codes in page order, field-wise */
    SECTION_CELLS,     /* page groups and their centroids, field-wise */
    SECTION_QUANTISER, /* codebooks, rotation, field-wise */
    SECTION_VECTORS,   /* originals, field-wise */
    SECTION_COLUMNS,   /* fixed-width columns and dictionaries */
    SECTION_ROWS,      /* compressed records of the other fields */
    SECTION_KEYS,      /* sorted keys */
    SECTION_STATS      /* calibration, counts, seeds */
};

#define SECTION_NAME_MAX 32u
#define SECTION_COUNT_MAX 1024u
#define BLOCK_CRC_BYTES 4u

struct segment_section {
    char name[SECTION_NAME_MAX]; /* also the file's name, e.g. "f0.pages" */
    char *path;                  /* for messages */
    enum section_kind kind;
    uint32_t number;      /* its place in the manifest, seeds the block CRCs */
    uint32_t block_bytes; /* multiple of FILE_BLOCK_BYTES */
    uint64_t block_count; /* payload blocks, header not counted */
    uint64_t payload_bytes;
    uint64_t file_bytes;
    struct vfs_file *file; /* open with VFS_DIRECT */
};

struct segment;

/* Reads and checks the manifest, opens every section, compares lengths, checks header blocks. Reads
 * no payload. ERR_CORRUPT names file and finding; ERR_NOT_FOUND when `path` is no segment. */
int segment_open(struct vfs *vfs, const char *path, struct segment **out, struct error *err);
void segment_close(struct segment *segment);

const char *segment_path(const struct segment *segment);
const uint8_t *segment_id(const struct segment *segment); /* DIGEST_BYTES */
uint64_t segment_row_count(const struct segment *segment);
const struct manifest *segment_manifest(const struct segment *segment);
uint32_t segment_section_count(const struct segment *segment);
const struct segment_section *segment_section_at(const struct segment *segment, uint32_t i);
/* NULL when there is none of that name. */
const struct segment_section *segment_find(const struct segment *segment, const char *name);

/* Place of payload block `block` (0-based) in the file. */
static inline uint64_t segment_block_offset(const struct segment_section *section, uint64_t block)
{
    return (block + 1) * section->block_bytes;
}

/* Checks the CRC of payload block `block` as read into `data` (block_bytes). ERR_CORRUPT with file
 * and offset. This is what every reader of pages calls. */
int segment_block_check(const struct segment *segment, const struct segment_section *section,
                        uint64_t block, const uint8_t *data, struct error *err);

/* Reads and verifies payload bytes [offset, offset + bytes) with plain reads, for start-up. */
int segment_read(const struct segment *segment, const struct segment_section *section,
                 uint64_t offset, uint64_t bytes, void *out, struct error *err);

/* One piece of payload to fetch in a burst. */
struct segment_span {
    const struct segment_section *section;
    uint64_t offset;
    uint32_t bytes;
    uint8_t *out;
};

/* Fetches `count` spans at once through the caller's reader, verified; *read_count (may be NULL)
 * grows by the 4 KiB reads spent. The reader must have nothing else in flight. */
int segment_read_spans(const struct segment *segment, struct reader *reader,
                       const struct segment_span *spans, uint32_t count, uint64_t *read_count,
                       struct error *err);

/* Verifies every block of every section and the manifest's checksums of whole files. */
int segment_check(const struct segment *segment, struct job *job, struct error *err);

#endif
