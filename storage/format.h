/* format: the bytes of a segment's section files and of the catalogue's seal, and nothing else.
 *
 * A section file is (block_count + 1) blocks of block_bytes each:
 *
 *   block 0       struct section_header, then zeros to the end of the block (checked)
 *   block 1..n    block_bytes - 4 bytes of payload, then the block's CRC-32C
 *
 * The CRC of block i covers, in this order: the segment's id (32 bytes), the section's number
 * (u32), i (u64), the block's payload bytes. Little-endian throughout.
 *
 * segment.manifest has for every section the CRC-32C of the whole file in order, and a SHA-256 of
 * blocks 1..n followed by block 0: the header holds the file's length, so it is the last thing the
 * writer knows, and a file is hashed once, while it is written. */
#ifndef ANND_STORAGE_FORMAT_H
#define ANND_STORAGE_FORMAT_H

#include <assert.h>
#include <stddef.h>
#include <stdint.h>

#define SECTION_MAGIC "ANNDSEC1"
#define SECTION_VERSION 1u
#define SECTION_BLOCK_BYTES_MAX (16u << 20)

struct section_header {
    char magic[8];              /* 000-007 "ANNDSEC1" */
    uint32_t version;           /* 008-011 readers refuse a version they do not know */
    uint32_t crc32c;            /* 012-015 of these 128 bytes, this field as zero */
    uint64_t file_bytes;        /* 016-023 a file of another length is ERR_CORRUPT */
    uint32_t kind;              /* 024-027 enum section_kind */
    uint32_t number;            /* 028-031 the section's place in segment.manifest */
    uint32_t block_bytes;       /* 032-035 multiple of 4,096 */
    uint32_t features_incompat; /* 036-039 an unknown bit refuses the file */
    uint32_t features_compat;   /* 040-043 unknown bits are ignored */
    uint32_t reserved_a;        /* 044-047 zero */
    uint8_t segment_id[32];     /* 048-079 the id in segment.manifest */
    char name[32];              /* 080-111 the file's name, padded with zeros */
    uint8_t reserved_b[16];     /* 112-127 zero */
};

static_assert(offsetof(struct section_header, crc32c) == 12, "on-disk layout");
static_assert(offsetof(struct section_header, file_bytes) == 16, "on-disk layout");
static_assert(offsetof(struct section_header, number) == 28, "on-disk layout");
static_assert(offsetof(struct section_header, features_compat) == 40, "on-disk layout");
static_assert(offsetof(struct section_header, segment_id) == 48, "on-disk layout");
static_assert(offsetof(struct section_header, name) == 80, "on-disk layout");
static_assert(sizeof(struct section_header) == 128, "on-disk layout");

#define CATALOGUE_SEAL_MAGIC "ANNDSEAL"
#define CATALOGUE_SEAL_VERSION 1u

struct catalogue_seal {      /* the file catalogue/SEAL, whole */
    char magic[8];           /* 000-007 "ANNDSEAL" */
    uint32_t version;        /* 008-011 another version: the catalogue is rebuilt */
    uint32_t crc32c;         /* 012-015 of these 128 bytes, this field as zero */
    uint64_t data_bytes;     /* 016-023 of data.mdb */
    uint64_t generation;     /* 024-031 of the MANIFEST it was made from */
    uint32_t data_crc32c;    /* 032-035 of data.mdb */
    uint32_t reserved_a;     /* 036-039 zero */
    uint8_t data_sha256[32]; /* 040-071 of data.mdb */
    uint8_t uuid[16];        /* 072-087 of the data directory */
    uint8_t reserved_b[40];  /* 088-127 zero */
};

static_assert(offsetof(struct catalogue_seal, generation) == 24, "on-disk layout");
static_assert(offsetof(struct catalogue_seal, data_sha256) == 40, "on-disk layout");
static_assert(offsetof(struct catalogue_seal, uuid) == 72, "on-disk layout");
static_assert(sizeof(struct catalogue_seal) == 128, "on-disk layout");

#endif
