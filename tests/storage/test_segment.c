/* Checks storage/segment.c and storage/segment_writer.c: what was appended comes back, damage of
 * any one byte is found, bytes from the wrong place are found, no failing call lets half a segment
 * be published, and a writer that was killed or lost its power is resumed to the same bytes. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "storage/base/bytes.h"
#include "storage/base/random.h"
#include "storage/file.h"
#include "storage/format.h"
#include "storage/segment.h"
#include "storage/segment_writer.h"
#include "tests/support/vfs_fault.h"

static char folder[256];

static int make_folder(void **state)
{
    const char *base = getenv("TMPDIR");

    (void)state;
    snprintf(folder, sizeof folder, "%s/annd-segment-XXXXXX", base ? base : "/var/tmp");
    return mkdtemp(folder) ? 0 : -1;
}

static int remove_folder(void **state)
{
    (void)state;
    return file_remove_all(vfs_posix(), folder, NULL);
}

struct part {
    const char *name;
    enum section_kind kind;
    uint32_t block_bytes;
    uint64_t payload_bytes;
};

/* Two blocks, one block that is not full, and none. */
static const struct part small[] = {{"f.pages", SECTION_PAGES, 4096, 2 * 4092},
                                    {"f.codes", SECTION_CODES, 8192, 5000},
                                    {"stats", SECTION_STATS, 4096, 0}};
/* Several runs of each kind of block. */
static const struct part large[] = {{"f.pages", SECTION_PAGES, 4096, 5000001},
                                    {"f.vectors", SECTION_VECTORS, 12288, 3000000},
                                    {"wide", SECTION_ROWS, 2u << 20, 5u << 20}};

static uint8_t *payload_of_part(const struct part *part, uint64_t seed)
{
    uint8_t *data = malloc(part->payload_bytes + 8);
    struct random random;

    random_init(&random, seed, part->kind);
    for (uint64_t i = 0; i < part->payload_bytes; i += 8)
        store_u64(data + i, random_u64(&random));
    return data;
}

static void make_id(uint8_t id[DIGEST_BYTES], uint64_t seed)
{
    memset(id, 0, DIGEST_BYTES);
    store_u64(id, seed);
    id[31] = 0xAB;
}

/* Whether write_segment makes a preview after each section. */
static bool previewing;

/* chunk: bytes handed over at a time. */
static int write_segment(struct vfs *vfs, const char *path, const struct part *parts,
                         uint32_t count, uint64_t seed, uint64_t chunk, struct error *err)
{
    struct segment_writer *writer = NULL;
    uint8_t id[DIGEST_BYTES];
    uint8_t *data = NULL;
    int rc = -1;

    make_id(id, seed);
    if (segment_writer_open(vfs, path, id, 77, &writer, err) < 0)
        goto done;
    if (manifest_set_u64(segment_writer_manifest(writer), "f.degree", 32, err) < 0)
        goto done;
    for (uint32_t i = 0; i < count; i++) {
        free(data);
        data = payload_of_part(&parts[i], seed);
        if (segment_writer_begin(writer, parts[i].name, parts[i].kind, parts[i].block_bytes, err) <
            0)
            goto done;
        for (uint64_t at = 0; at < parts[i].payload_bytes; at += chunk) {
            uint64_t left = parts[i].payload_bytes - at;

            if (segment_writer_append(writer, data + at, left < chunk ? left : chunk, err) < 0)
                goto done;
        }
        if (segment_writer_offset(writer) != parts[i].payload_bytes) {
            error_set(err, ERR_INTERNAL, "the offset is wrong");
            goto done;
        }
        if (segment_writer_end(writer, err) < 0 ||
            (previewing && segment_writer_preview(writer, err) < 0))
            goto done;
    }
    rc = segment_writer_publish(writer, err);
done:
    free(data);
    segment_writer_close(writer);
    return rc;
}

static void must_write(const char *path, const struct part *parts, uint32_t count, uint64_t seed)
{
    struct error err = ERROR_INIT;

    if (write_segment(vfs_posix(), path, parts, count, seed, 100000, &err) < 0)
        fail_msg("%s", err.message);
}

static struct segment *must_open(struct vfs *vfs, const char *path)
{
    struct segment *segment = NULL;
    struct error err = ERROR_INIT;

    if (segment_open(vfs, path, &segment, &err) < 0)
        fail_msg("%s", err.message);
    return segment;
}

/* Every payload byte: 1 as written, 0 when some read said it was damaged; fails when a read
 * succeeded with other bytes. */
static int payload_is_right(const struct segment *segment, const struct part *parts, uint32_t count,
                            uint64_t seed)
{
    int right = 1;

    for (uint32_t i = 0; i < count; i++) {
        const struct segment_section *section = segment_find(segment, parts[i].name);
        uint8_t *wanted = payload_of_part(&parts[i], seed);
        uint8_t *found = malloc(parts[i].payload_bytes + 1);

        assert_non_null(section);
        assert_int_equal(section->payload_bytes, parts[i].payload_bytes);
        if (segment_read(segment, section, 0, parts[i].payload_bytes, found, NULL) < 0)
            right = 0;
        else
            assert_memory_equal(wanted, found, parts[i].payload_bytes);
        free(wanted);
        free(found);
    }
    return right;
}

static void path_in(char out[400], const char *name)
{
    snprintf(out, 400, "%s/%s", folder, name);
}

static void test_a_segment_comes_back_as_it_was_written(void **state)
{
    struct segment *segment;
    struct error err = ERROR_INIT;
    const struct segment_section *section;
    uint8_t id[DIGEST_BYTES];
    uint64_t degree;
    char path[400];

    (void)state;
    path_in(path, "round");
    must_write(path, large, 3, 5);
    segment = must_open(vfs_posix(), path);
    make_id(id, 5);
    assert_memory_equal(segment_id(segment), id, DIGEST_BYTES);
    assert_int_equal(segment_row_count(segment), 77);
    assert_string_equal(segment_path(segment), path);
    assert_int_equal(manifest_get_u64(segment_manifest(segment), "f.degree", &degree, NULL), 0);
    assert_int_equal(degree, 32);
    assert_false(manifest_has(segment_manifest(segment), "generation"));
    assert_int_equal(segment_section_count(segment), 3);
    assert_null(segment_section_at(segment, 3));
    assert_null(segment_find(segment, "f.page"));
    section = segment_section_at(segment, 1);
    assert_string_equal(section->name, "f.vectors");
    assert_int_equal(section->kind, SECTION_VECTORS);
    assert_int_equal(section->number, 1);
    assert_int_equal(section->block_count, (3000000 + 12283) / 12284);
    assert_int_equal(section->file_bytes, (section->block_count + 1) * 12288);
    assert_int_equal(payload_is_right(segment, large, 3, 5), 1);
    if (segment_check(segment, NULL, &err) < 0)
        fail_msg("%s", err.message);
    segment_close(segment);
}

static void test_any_range_can_be_read_and_none_past_the_end(void **state)
{
    struct segment *segment;
    struct random random;
    char path[400];

    (void)state;
    path_in(path, "ranges");
    must_write(path, large, 3, 6);
    segment = must_open(vfs_posix(), path);
    random_init(&random, 1, 0);
    for (uint32_t i = 0; i < 3; i++) {
        const struct segment_section *section = segment_section_at(segment, i);
        uint8_t *wanted = payload_of_part(&large[i], 6);
        uint8_t *found = malloc(section->payload_bytes);
        uint8_t byte;

        for (int n = 0; n < 50; n++) {
            uint64_t offset = random_below(&random, section->payload_bytes + 1);
            uint64_t bytes = random_below(&random, (section->payload_bytes - offset) / (n + 1) + 1);

            assert_int_equal(segment_read(segment, section, offset, bytes, found, NULL), 0);
            assert_memory_equal(wanted + offset, found, bytes);
        }
        for (int n = 0; n < 4; n++) {
            static const uint64_t hostile[][2] = {{0, 1}, {1, 0}, {UINT64_MAX, 1}, {1, UINT64_MAX}};
            struct error err = ERROR_INIT;
            uint64_t offset = n < 2 ? section->payload_bytes + hostile[n][0] : hostile[n][0];

            assert_int_equal(
                segment_read(segment, section, offset, n < 2 ? 1 : hostile[n][1], &byte, &err), -1);
            assert_int_equal(err.code, ERR_CORRUPT);
        }
        free(wanted);
        free(found);
    }
    segment_close(segment);
}

static void read_file(const char *segment, const char *name, uint8_t **data, size_t *bytes)
{
    char path[500];
    struct error err = ERROR_INIT;

    snprintf(path, sizeof path, "%s/%s", segment, name);
    if (file_read_whole(vfs_posix(), path, 1u << 30, data, bytes, &err) < 0)
        fail_msg("%s", err.message);
}

static void test_equal_input_gives_equal_files_however_it_is_cut(void **state)
{
    static const uint64_t chunks[] = {1000000, 4092, 777, 4096};
    static const char *const names[] = {"f.pages", "f.vectors", "wide", "segment.manifest"};
    char first[400], other[400], name[20];

    (void)state;
    path_in(first, "cut0");
    for (uint32_t c = 0; c < 4; c++) {
        struct error err = ERROR_INIT;

        snprintf(name, sizeof name, "cut%u", c);
        path_in(other, name);
        if (write_segment(vfs_posix(), other, large, 3, 9, chunks[c], &err) < 0)
            fail_msg("%s", err.message);
        for (uint32_t i = 0; c > 0 && i < 4; i++) {
            uint8_t *a, *b;
            size_t a_bytes, b_bytes;

            read_file(first, names[i], &a, &a_bytes);
            read_file(other, names[i], &b, &b_bytes);
            assert_int_equal(a_bytes, b_bytes);
            assert_memory_equal(a, b, a_bytes);
            free(a);
            free(b);
        }
    }
}

/* Reads through to the real files, without O_DIRECT, and flips one bit of one file. */
struct flip_vfs {
    struct vfs vfs;
    const char *name; /* end of the path */
    uint64_t offset;
    uint8_t mask;
    struct vfs_file *file;
};

static int flip_open(struct vfs *vfs, const char *path, unsigned flags, struct vfs_file **out)
{
    struct flip_vfs *flip = (struct flip_vfs *)vfs;
    size_t path_bytes = strlen(path), name_bytes = strlen(flip->name);
    int rc = vfs_posix()->open(vfs, path, flags & ~(unsigned)VFS_DIRECT, out);

    if (rc == 0 && path_bytes > name_bytes && path[path_bytes - name_bytes - 1] == '/' &&
        strcmp(path + path_bytes - name_bytes, flip->name) == 0)
        flip->file = *out;
    return rc;
}

static int flip_pread(struct vfs_file *file, void *buffer, size_t bytes, uint64_t offset,
                      size_t *got)
{
    struct flip_vfs *flip = (struct flip_vfs *)file->vfs;
    int rc = vfs_posix()->pread(file, buffer, bytes, offset, got);

    if (rc == 0 && file == flip->file && flip->offset >= offset && flip->offset < offset + *got)
        ((uint8_t *)buffer)[flip->offset - offset] ^= flip->mask;
    return rc;
}

static int flip_close(struct vfs_file *file)
{
    struct flip_vfs *flip = (struct flip_vfs *)file->vfs;

    if (file == flip->file)
        flip->file = NULL;
    return vfs_posix()->close(file);
}

static void test_every_flipped_byte_of_every_file_is_found(void **state)
{
    static const char *const names[] = {"segment.manifest", "f.pages", "f.codes", "stats"};
    uint64_t by_open = 0, by_check = 0;
    char path[400];

    (void)state;
    path_in(path, "flips");
    must_write(path, small, 3, 11);
    for (uint32_t i = 0; i < 4; i++) {
        struct flip_vfs flip = {.vfs = *vfs_posix(), .name = names[i]};
        uint8_t *data;
        size_t bytes;

        flip.vfs.open = flip_open;
        flip.vfs.pread = flip_pread;
        flip.vfs.close = flip_close;
        read_file(path, names[i], &data, &bytes);
        free(data);
        for (uint64_t at = 0; at < bytes; at++) {
            struct segment *segment = NULL;
            struct error err = ERROR_INIT;

            flip.offset = at;
            flip.mask = (uint8_t)(1u << (at * 7 + at / 8) % 8);
            if (segment_open(&flip.vfs, path, &segment, &err) < 0) {
                by_open++;
            } else if (segment_check(segment, NULL, &err) < 0) {
                by_check++;
                assert_int_equal(payload_is_right(segment, small, 3, 11), 0);
            } else {
                fail_msg("%s: byte %lu flipped is not found", names[i], (unsigned long)at);
            }
            if (err.code != ERR_CORRUPT && err.code != ERR_UNSUPPORTED)
                fail_msg("%s: byte %lu flipped gives %s: %s", names[i], (unsigned long)at,
                         error_code_name(err.code), err.message);
            segment_close(segment);
        }
    }
    /* Header blocks and manifest at open, payload blocks by the check. */
    assert_int_equal(by_check, 2 * 4096 + 8192);
    assert_true(by_open > 4096 + 8192 + 4096);
}

static void copy_segment(const char *from, const char *to)
{
    char **names;
    uint32_t count;

    assert_int_equal(file_mkdir(vfs_posix(), to, NULL), 0);
    assert_int_equal(file_list(vfs_posix(), from, &names, &count, NULL), 0);
    for (uint32_t i = 0; i < count; i++) {
        char path[500];
        uint8_t *data;
        size_t bytes;

        read_file(from, names[i], &data, &bytes);
        snprintf(path, sizeof path, "%s/%s", to, names[i]);
        assert_int_equal(file_publish(vfs_posix(), path, data, bytes, NULL), 0);
        free(data);
    }
    file_names_free(names, count);
}

static void replace_file(const char *segment, const char *name, const uint8_t *data, size_t bytes)
{
    char path[500];

    snprintf(path, sizeof path, "%s/%s", segment, name);
    assert_int_equal(file_publish(vfs_posix(), path, data, bytes, NULL), 0);
}

static enum error_code open_code(const char *path)
{
    struct segment *segment = NULL;
    struct error err = ERROR_INIT;

    segment_open(vfs_posix(), path, &segment, &err);
    segment_close(segment);
    return err.code;
}

static void test_files_of_another_length_are_found_at_open(void **state)
{
    static const char *const names[] = {"segment.manifest", "f.pages", "f.codes", "stats"};
    char path[400];

    (void)state;
    path_in(path, "lengths");
    must_write(path, small, 3, 12);
    for (uint32_t i = 0; i < 4; i++) {
        uint8_t *data, *longer;
        size_t bytes;

        read_file(path, names[i], &data, &bytes);
        longer = calloc(1, bytes + 4096);
        memcpy(longer, data, bytes);
        for (uint64_t cut = 0; cut < 5; cut++) {
            const uint64_t lengths[] = {0, 1, bytes / 2, bytes - 4096, bytes - 1};

            if (lengths[cut] > bytes) /* the manifest has less than a block */
                continue;
            replace_file(path, names[i], data, lengths[cut]);
            assert_int_equal(open_code(path), ERR_CORRUPT);
        }
        replace_file(path, names[i], longer, bytes + 1);
        assert_int_equal(open_code(path), ERR_CORRUPT);
        replace_file(path, names[i], longer, bytes + 4096);
        assert_int_equal(open_code(path), ERR_CORRUPT);
        replace_file(path, names[i], data, bytes);
        assert_int_equal(open_code(path), ERR_NONE);
        free(data);
        free(longer);
    }
}

static void test_a_missing_section_is_damage_and_a_missing_segment_is_not_found(void **state)
{
    char path[400], section[500], file[400];

    (void)state;
    path_in(path, "missing");
    assert_int_equal(open_code(path), ERR_NOT_FOUND);
    assert_int_equal(open_code(folder), ERR_NOT_FOUND);
    must_write(path, small, 3, 13);
    snprintf(section, sizeof section, "%s/f.codes", path);
    assert_int_equal(file_remove_all(vfs_posix(), section, NULL), 0);
    assert_int_equal(open_code(path), ERR_CORRUPT);
    assert_int_equal(file_mkdir(vfs_posix(), section, NULL), 0);
    assert_int_not_equal(open_code(path), ERR_NONE);
    path_in(file, "plain");
    assert_int_equal(file_publish(vfs_posix(), file, "x", 1, NULL), 0);
    assert_int_not_equal(open_code(file), ERR_NONE);
}

/* Every block is right in itself, and in the wrong place. */
static void test_swapped_blocks_are_found_by_read_and_check(void **state)
{
    struct error err = ERROR_INIT;
    struct segment *segment;
    uint8_t block[4096], out[8184];
    uint8_t *data;
    size_t bytes;
    char path[400];

    (void)state;
    path_in(path, "swapped");
    must_write(path, small, 3, 14);
    read_file(path, "f.pages", &data, &bytes);
    memcpy(block, data + 4096, 4096);
    memcpy(data + 4096, data + 8192, 4096);
    memcpy(data + 8192, block, 4096);
    replace_file(path, "f.pages", data, bytes);
    segment = must_open(vfs_posix(), path);
    assert_int_equal(segment_read(segment, segment_section_at(segment, 0), 0, 8184, out, &err), -1);
    assert_int_equal(err.code, ERR_CORRUPT);
    assert_non_null(strstr(err.message, "f.pages: block at byte 4096"));
    error_clear(&err);
    assert_int_equal(segment_check(segment, NULL, &err), -1);
    assert_int_equal(err.code, ERR_CORRUPT);
    assert_int_equal(payload_is_right(segment, small, 3, 14), 0);
    segment_close(segment);
    free(data);
}

static void test_a_section_of_another_segment_or_place_is_found(void **state)
{
    static const struct part twins[] = {{"a", SECTION_PAGES, 4096, 4000},
                                        {"b", SECTION_PAGES, 4096, 4000}};
    struct segment *segment;
    uint8_t *own, *foreign;
    size_t own_bytes, bytes;
    uint8_t out[4000];
    char one[400], two[400];

    (void)state;
    path_in(one, "one");
    path_in(two, "two");
    must_write(one, twins, 2, 15);
    must_write(two, twins, 2, 16);
    read_file(one, "a", &own, &own_bytes);
    read_file(two, "a", &foreign, &bytes);
    assert_int_equal(own_bytes, bytes);
    replace_file(one, "a", foreign, bytes);
    assert_int_equal(open_code(one), ERR_CORRUPT);
    /* Its header made to fit, its blocks still give it away. */
    memcpy(foreign, own, 4096);
    replace_file(one, "a", foreign, bytes);
    segment = must_open(vfs_posix(), one);
    assert_int_equal(segment_read(segment, segment_find(segment, "a"), 0, 4000, out, NULL), -1);
    assert_int_equal(segment_read(segment, segment_find(segment, "b"), 0, 4000, out, NULL), 0);
    segment_close(segment);
    /* The same for the neighbour of the same segment. */
    free(foreign);
    read_file(one, "b", &foreign, &bytes);
    replace_file(one, "a", foreign, bytes);
    assert_int_equal(open_code(one), ERR_CORRUPT);
    memcpy(foreign, own, 4096);
    replace_file(one, "a", foreign, bytes);
    segment = must_open(vfs_posix(), one);
    assert_int_equal(segment_read(segment, segment_find(segment, "a"), 0, 4000, out, NULL), -1);
    segment_close(segment);
    free(own);
    free(foreign);
}

/* Everything right to the last CRC, but not what the manifest was made for. */
static void test_whole_file_checksums_find_what_blocks_cannot(void **state)
{
    struct segment *segment;
    struct manifest *manifest;
    struct error err = ERROR_INIT;
    uint8_t *data;
    size_t bytes;
    uint8_t sha256[32] = {1};
    char path[400], file[500];

    (void)state;
    path_in(path, "sums");
    must_write(path, small, 3, 17);
    snprintf(file, sizeof file, "%s/segment.manifest", path);
    for (int i = 0; i < 2; i++) {
        assert_int_equal(manifest_read(vfs_posix(), MANIFEST_SEGMENT, file, &manifest, NULL), 0);
        if (i == 0)
            manifest_set_bytes(manifest, "section.001.sha256", sha256, 32, NULL);
        else
            manifest_set_u64(manifest, "section.000.crc32c", 1, NULL);
        manifest_encode(manifest, &data, &bytes, NULL);
        replace_file(path, "segment.manifest", data, bytes);
        segment = must_open(vfs_posix(), path);
        error_clear(&err);
        assert_int_equal(segment_check(segment, NULL, &err), -1);
        assert_int_equal(err.code, ERR_CORRUPT);
        segment_close(segment);
        free(data);
        manifest_free(manifest);
    }
}

static void test_hostile_manifests_are_refused(void **state)
{
    static const struct {
        const char *entry;
        uint64_t value;
        const char *text;
    } attacks[] = {
        {"section.000.name", 0, "../one/a"},
        {"section.000.name", 0, ".."},
        {"section.000.name", 0, ""},
        {"section.000.name", 0, "f.codes"},
        {"section.000.name", 0, "segment.manifest"},
        {"section.000.name", 0, "a-name-of-thirty-two-characters-"},
        {"section.005.name", 0, "gap"},
        {"section.000.block_bytes", 0, NULL},
        {"section.000.block_bytes", 4095, NULL},
        {"section.000.block_bytes", 6000, NULL},
        {"section.000.block_bytes", 8192, NULL},
        {"section.000.block_bytes", UINT64_MAX, NULL},
        {"section.000.block_bytes", 1ull << 32, NULL},
        {"section.000.payload_bytes", UINT64_MAX, NULL},
        {"section.000.payload_bytes", INT64_MAX, NULL},
        {"section.000.payload_bytes", 4092, NULL},
        {"section.000.payload_bytes", 3 * 4092, NULL},
        {"section.000.file_bytes", 0, NULL},
        {"section.000.file_bytes", UINT64_MAX, NULL},
        {"section.000.file_bytes", 16384, NULL},
        {"section.000.kind", 0, NULL},
        {"section.000.kind", SECTION_CODES, NULL},
        {"section.000.kind", UINT64_MAX, NULL},
        {"id", 5, NULL},
        {"id", 0, "text"},
        {"rows", 0, "text"},
    };
    struct manifest *manifest;
    uint8_t *original, *data;
    size_t original_bytes, bytes;
    char path[400];

    (void)state;
    path_in(path, "hostile");
    must_write(path, small, 3, 18);
    read_file(path, "segment.manifest", &original, &original_bytes);
    for (size_t i = 0; i < sizeof attacks / sizeof attacks[0]; i++) {
        enum error_code code;

        assert_int_equal(
            manifest_decode(MANIFEST_SEGMENT, original, original_bytes, "m", &manifest, NULL), 0);
        if (attacks[i].text)
            manifest_set_text(manifest, attacks[i].entry, attacks[i].text, NULL);
        else
            manifest_set_u64(manifest, attacks[i].entry, attacks[i].value, NULL);
        manifest_encode(manifest, &data, &bytes, NULL);
        replace_file(path, "segment.manifest", data, bytes);
        code = open_code(path);
        if (code != ERR_CORRUPT)
            fail_msg("attack %zu on %s gives %s", i, attacks[i].entry, error_code_name(code));
        free(data);
        manifest_free(manifest);
    }
    free(original);
}

static void test_a_burst_returns_what_single_reads_do(void **state)
{
    static const enum reader_backend backends[] = {READER_PREAD, READER_URING};
    enum { SPANS = 300 };
    struct segment *segment;
    struct random random;
    uint8_t *payloads[3];
    char path[400];

    (void)state;
    path_in(path, "burst");
    must_write(path, large, 3, 20);
    segment = must_open(vfs_posix(), path);
    for (int i = 0; i < 3; i++)
        payloads[i] = payload_of_part(&large[i], 20);
    random_init(&random, 3, 0);
    for (int round = 0; round < 24; round++) {
        uint32_t depth = round % 3 == 0 ? 1 : round % 3 == 1 ? 8 : 256;
        struct segment_span spans[SPANS];
        struct reader *reader = NULL;
        struct error err = ERROR_INIT;
        uint64_t reads = 1000, naive = 0;
        uint32_t count = round < 2 ? (uint32_t)round : SPANS;

        if (reader_open(backends[round % 2], depth, &reader, &err) < 0) {
            assert_int_equal(err.code, ERR_UNSUPPORTED); /* a kernel without io_uring */
            continue;
        }
        for (uint32_t i = 0; i < count; i++) {
            uint32_t s = (uint32_t)random_below(&random, round % 4 == 3 ? 2 : 3);
            const struct segment_section *section = segment_section_at(segment, s);
            uint64_t payload = section->block_bytes - 4;
            uint64_t most = i % 50 == 0 ? 3000000 : i % 3 == 0 ? 20000 : 400;

            spans[i].section = section;
            spans[i].offset = random_below(&random, section->payload_bytes + 1);
            if (most > section->payload_bytes - spans[i].offset)
                most = section->payload_bytes - spans[i].offset;
            spans[i].bytes = (uint32_t)random_below(&random, most + 1);
            spans[i].out = malloc(spans[i].bytes + 1);
            spans[i].out[spans[i].bytes] = 0x5A;
            if (spans[i].bytes > 0)
                naive += ((spans[i].offset + spans[i].bytes - 1) / payload -
                          spans[i].offset / payload + 1) *
                         section->block_bytes / 4096;
        }
        if (segment_read_spans(segment, reader, spans, count, &reads, &err) < 0)
            fail_msg("round %d: %s", round, err.message);
        assert_int_equal(reader_in_flight(reader), 0);
        /* Never more than one by one. */
        assert_true(reads - 1000 <= naive);
        for (uint32_t i = 0; i < count; i++) {
            assert_memory_equal(spans[i].out, payloads[spans[i].section->number] + spans[i].offset,
                                spans[i].bytes);
            assert_int_equal(spans[i].out[spans[i].bytes], 0x5A);
            free(spans[i].out);
        }
        reader_close(reader);
    }
    for (int i = 0; i < 3; i++)
        free(payloads[i]);
    segment_close(segment);
}

static void test_spans_of_one_block_cost_one_read(void **state)
{
    struct segment *segment;
    struct reader *reader;
    struct segment_span spans[3];
    uint8_t out[3][100];
    uint64_t reads = 0;
    char path[400];

    (void)state;
    path_in(path, "shared");
    must_write(path, small, 3, 21);
    segment = must_open(vfs_posix(), path);
    assert_int_equal(reader_open(READER_PREAD, 4, &reader, NULL), 0);
    for (int i = 0; i < 3; i++)
        spans[i] =
            (struct segment_span){segment_section_at(segment, 0), 3000u - 1000u * i, 100, out[i]};
    assert_int_equal(segment_read_spans(segment, reader, spans, 3, &reads, NULL), 0);
    assert_int_equal(reads, 1);
    spans[2].offset = 4092; /* the block after it: one run of two */
    assert_int_equal(segment_read_spans(segment, reader, spans, 3, &reads, NULL), 0);
    assert_int_equal(reads, 3);
    spans[1].bytes = 8000;
    assert_int_equal(segment_read_spans(segment, reader, spans, 3, &reads, NULL), -1);
    assert_int_equal(reads, 3);
    reader_close(reader);
    segment_close(segment);
}

static void test_a_failing_or_flipped_read_fails_the_burst_and_drains_it(void **state)
{
    static const enum reader_backend backends[] = {READER_PREAD, READER_URING};
    static const struct vfs_fault_plan plans[] = {
        {.call = VFS_CALL_READ, .errno_value = EIO},
        {.call = VFS_CALL_READ, .effect = VFS_EFFECT_FLIP, .bit = 12345},
    };
    enum { SPANS = 40 };
    struct vfs_fault fault;
    struct segment *segment;
    uint8_t *wanted = payload_of_part(&large[0], 22);
    char path[400];

    (void)state;
    path_in(path, "faults");
    must_write(path, large, 3, 22);
    vfs_fault_init(&fault, vfs_posix());
    segment = must_open(&fault.vfs, path);
    for (uint32_t trial = 0; trial < 4; trial++) {
        struct reader *reader = NULL;
        struct segment_span spans[SPANS];
        struct error err = ERROR_INIT;

        if (reader_open(backends[trial % 2], 7, &reader, &err) < 0)
            continue;
        for (uint32_t i = 0; i < SPANS; i++)
            spans[i] = (struct segment_span){segment_section_at(segment, 0), 100000ull * i, 1000,
                                             malloc(1000)};
        for (uint64_t nth = 1; nth <= SPANS; nth += 3) {
            struct vfs_fault_plan plan = plans[trial / 2];

            plan.nth = nth;
            vfs_fault_plan(&fault, &plan);
            error_clear(&err);
            assert_int_equal(segment_read_spans(segment, reader, spans, SPANS, NULL, &err), -1);
            assert_int_equal(err.code, trial / 2 == 0 ? ERR_IO : ERR_CORRUPT);
            assert_int_equal(reader_in_flight(reader), 0);
        }
        /* The reader is as good as before. */
        vfs_fault_plan(&fault, NULL);
        assert_int_equal(segment_read_spans(segment, reader, spans, SPANS, NULL, NULL), 0);
        for (uint32_t i = 0; i < SPANS; i++) {
            assert_memory_equal(spans[i].out, wanted + spans[i].offset, 1000);
            free(spans[i].out);
        }
        reader_close(reader);
    }
    segment_close(segment);
    assert_int_equal(vfs_fault_files_open(&fault), 0);
    vfs_fault_release(&fault);
    free(wanted);
}

static void test_a_cancelled_check_says_so(void **state)
{
    struct job *job = job_new(NULL, NULL);
    struct error err = ERROR_INIT;
    struct segment *segment;
    char path[400];

    (void)state;
    path_in(path, "cancelled");
    must_write(path, small, 3, 23);
    segment = must_open(vfs_posix(), path);
    assert_int_equal(segment_check(segment, job, &err), 0);
    job_cancel(job);
    assert_int_equal(segment_check(segment, job, &err), -1);
    assert_int_equal(err.code, ERR_CANCELLED);
    segment_close(segment);
    job_free(job);
}

static void test_the_writer_refuses_what_it_cannot_do(void **state)
{
    struct segment_writer *writer = NULL, *second = NULL;
    uint8_t id[DIGEST_BYTES] = {0};
    static const char *const bad_names[] = {"",
                                            ".",
                                            "..",
                                            "a/b",
                                            "A",
                                            ".hidden",
                                            "segment.manifest",
                                            "a-name-of-thirty-two-characters-"};
    struct error err = ERROR_INIT;
    char path[400], tmp[410];

    (void)state;
    path_in(path, "refusals");
    snprintf(tmp, sizeof tmp, "%s.tmp", path);
    assert_int_equal(segment_writer_open(vfs_posix(), path, id, 0, &writer, NULL), 0);
    assert_int_equal(segment_writer_append(writer, "x", 1, NULL), -1);
    assert_int_equal(segment_writer_end(writer, NULL), -1);
    for (size_t i = 0; i < sizeof bad_names / sizeof bad_names[0]; i++)
        assert_int_equal(segment_writer_begin(writer, bad_names[i], SECTION_PAGES, 4096, NULL), -1);
    for (uint32_t i = 0; i < 4; i++) {
        static const uint32_t bad_blocks[] = {0, 512, 4097, 32u << 20};

        assert_int_equal(segment_writer_begin(writer, "a", SECTION_PAGES, bad_blocks[i], NULL), -1);
    }
    assert_int_equal(segment_writer_begin(writer, "a", SECTION_PAGES, 4096, NULL), 0);
    assert_int_equal(segment_writer_begin(writer, "b", SECTION_PAGES, 4096, NULL), -1);
    assert_int_equal(segment_writer_publish(writer, NULL), -1);
    assert_int_equal(segment_writer_append(writer, "x", 1, NULL), 0);
    assert_int_equal(segment_writer_end(writer, NULL), 0);
    assert_int_equal(segment_writer_begin(writer, "a", SECTION_PAGES, 4096, NULL), -1);
    assert_int_equal(segment_writer_publish(writer, NULL), 0);
    assert_int_equal(segment_writer_publish(writer, NULL), -1);
    assert_int_equal(segment_writer_begin(writer, "c", SECTION_PAGES, 4096, NULL), -1);
    segment_writer_close(writer);
    assert_int_equal(open_code(path), ERR_NONE);
    assert_false(file_exists(vfs_posix(), tmp));
    assert_int_equal(segment_writer_open(vfs_posix(), path, id, 0, &second, &err), -1);
    assert_int_equal(err.code, ERR_EXISTS);
    assert_null(second);
}

static void test_a_leftover_tmp_is_replaced_and_an_unpublished_one_removed(void **state)
{
    struct segment_writer *writer = NULL;
    uint8_t id[DIGEST_BYTES] = {0};
    char path[400], tmp[410], junk[500];

    (void)state;
    path_in(path, "leftover");
    snprintf(tmp, sizeof tmp, "%s.tmp", path);
    snprintf(junk, sizeof junk, "%s/f.pages", tmp);
    assert_int_equal(file_mkdir(vfs_posix(), tmp, NULL), 0);
    assert_int_equal(file_publish(vfs_posix(), junk, "old", 3, NULL), 0);
    must_write(path, small, 3, 24);
    assert_int_equal(open_code(path), ERR_NONE);
    assert_false(file_exists(vfs_posix(), tmp));
    assert_int_equal(file_remove_all(vfs_posix(), path, NULL), 0);
    assert_int_equal(segment_writer_open(vfs_posix(), path, id, 0, &writer, NULL), 0);
    assert_int_equal(segment_writer_begin(writer, "a", SECTION_PAGES, 4096, NULL), 0);
    assert_true(file_exists(vfs_posix(), tmp));
    segment_writer_close(writer);
    assert_false(file_exists(vfs_posix(), tmp));
    assert_false(file_exists(vfs_posix(), path));
    /* A name with a slash at its end is the same place. */
    snprintf(junk, sizeof junk, "%s/", path);
    must_write(junk, small, 3, 24);
    assert_int_equal(open_code(path), ERR_NONE);
}

static void append_part(struct segment_writer *writer, const struct part *part, uint64_t seed)
{
    uint8_t *data = payload_of_part(part, seed);
    struct error err = ERROR_INIT;

    if (segment_writer_begin(writer, part->name, part->kind, part->block_bytes, &err) < 0 ||
        segment_writer_append(writer, data, part->payload_bytes, &err) < 0 ||
        segment_writer_end(writer, &err) < 0)
        fail_msg("%s", err.message);
    free(data);
}

static void test_a_preview_opens_and_the_writer_goes_on(void **state)
{
    struct segment_writer *writer = NULL;
    struct segment *early, *later, *plain;
    uint8_t id[DIGEST_BYTES];
    char path[400], tmp[410], other[400], manifest[500];
    uint8_t *bytes[2] = {NULL, NULL};
    size_t counts[2];

    (void)state;
    path_in(path, "previewed");
    snprintf(tmp, sizeof tmp, "%s.tmp", path);
    make_id(id, 41);
    assert_int_equal(segment_writer_open(vfs_posix(), path, id, 77, &writer, NULL), 0);
    assert_string_equal(segment_writer_folder(writer), tmp);
    assert_int_equal(manifest_set_u64(segment_writer_manifest(writer), "f.degree", 32, NULL), 0);
    assert_int_equal(segment_writer_preview(writer, NULL), 0); /* of nothing yet */
    append_part(writer, &small[0], 41);
    assert_int_equal(segment_writer_preview(writer, NULL), 0);
    early = must_open(vfs_posix(), segment_writer_folder(writer));
    assert_int_equal(segment_section_count(early), 1);
    append_part(writer, &small[1], 41);
    assert_int_equal(segment_writer_preview(writer, NULL), 0); /* a second one, over the first */
    later = must_open(vfs_posix(), tmp);
    assert_int_equal(payload_is_right(later, small, 2, 41), 1);
    assert_int_equal(segment_writer_begin(writer, small[2].name, small[2].kind, 4096, NULL), 0);
    assert_int_equal(segment_writer_preview(writer, NULL), -1); /* a section is open */
    assert_int_equal(segment_writer_end(writer, NULL), 0);
    assert_int_equal(payload_is_right(early, small, 1, 41), 1);
    assert_int_equal(segment_writer_publish(writer, NULL), 0);
    assert_int_equal(segment_writer_preview(writer, NULL), -1);
    segment_close(early);
    segment_close(later);
    segment_writer_close(writer);
    assert_false(file_exists(vfs_posix(), tmp));

    /* No trace of it: the same bytes as without. */
    path_in(other, "not-previewed");
    must_write(other, small, 3, 41);
    for (uint32_t i = 0; i < 2; i++) {
        snprintf(manifest, sizeof manifest, "%s/segment.manifest", i ? other : path);
        assert_int_equal(
            file_read_whole(vfs_posix(), manifest, 1u << 20, &bytes[i], &counts[i], NULL), 0);
    }
    assert_int_equal(counts[0], counts[1]);
    assert_memory_equal(bytes[0], bytes[1], counts[0]);
    free(bytes[0]);
    free(bytes[1]);
    plain = must_open(vfs_posix(), path);
    assert_int_equal(segment_check(plain, NULL, NULL), 0);
    assert_int_equal(payload_is_right(plain, small, 3, 41), 1);
    segment_close(plain);
}

static void test_a_preview_that_is_not_published_leaves_nothing(void **state)
{
    struct segment_writer *writer = NULL;
    uint8_t id[DIGEST_BYTES];
    char path[400], tmp[410];

    (void)state;
    path_in(path, "preview-dropped");
    snprintf(tmp, sizeof tmp, "%s.tmp", path);
    make_id(id, 42);
    assert_int_equal(segment_writer_open(vfs_posix(), path, id, 77, &writer, NULL), 0);
    append_part(writer, &small[0], 42);
    assert_int_equal(segment_writer_preview(writer, NULL), 0);
    assert_int_equal(open_code(path), ERR_NOT_FOUND);
    segment_writer_close(writer);
    assert_false(file_exists(vfs_posix(), path));
    assert_false(file_exists(vfs_posix(), tmp));
}

static void test_a_copied_segment_is_the_same_segment(void **state)
{
    struct segment *segment;
    char from[400], to[400];

    (void)state;
    path_in(from, "copied-from");
    path_in(to, "copied-to");
    must_write(from, small, 3, 25);
    copy_segment(from, to);
    segment = must_open(vfs_posix(), to);
    assert_int_equal(segment_check(segment, NULL, NULL), 0);
    segment_close(segment);
}

/* Fails every call of writing and publishing, one after the other. */
static void sweep(const struct vfs_fault_plan *kind, bool claims_success)
{
    struct vfs_fault fault;
    struct error err = ERROR_INIT;
    uint64_t calls;
    char path[400], tmp[410];

    path_in(path, "sweep");
    snprintf(tmp, sizeof tmp, "%s.tmp", path);
    vfs_fault_init(&fault, vfs_posix());
    vfs_fault_plan(&fault, NULL);
    assert_int_equal(write_segment(&fault.vfs, path, small, 3, 30, 1000, &err), 0);
    calls = vfs_fault_calls(&fault, kind->call);
    assert_true(calls > 0);
    for (uint64_t nth = 1; nth <= calls; nth++) {
        struct vfs_fault_plan plan = *kind;
        struct segment *segment = NULL;
        int rc;

        assert_int_equal(file_remove_all(vfs_posix(), path, NULL), 0);
        plan.nth = nth;
        vfs_fault_plan(&fault, &plan);
        error_clear(&err);
        rc = write_segment(&fault.vfs, path, small, 3, 30, 1000, &err);
        vfs_fault_plan(&fault, NULL);
        assert_int_equal(vfs_fault_files_open(&fault), 0);
        if (rc < 0) {
            assert_int_not_equal(err.code, ERR_NONE);
            if (file_exists(vfs_posix(), path))
                fail_msg("call %lu failed (%s) and left a segment", (unsigned long)nth,
                         err.message);
            /* And the way is free for the next try. */
            assert_int_equal(write_segment(vfs_posix(), path, small, 3, 30, 1000, NULL), 0);
        }
        if (!claims_success || rc < 0) {
            segment = must_open(vfs_posix(), path);
            assert_int_equal(segment_check(segment, NULL, NULL), 0);
            assert_int_equal(payload_is_right(segment, small, 3, 30), 1);
        } else if (segment_open(vfs_posix(), path, &segment, NULL) == 0) {
            /* The disk lied: either it made no difference or the check tells. */
            bool sound = segment_check(segment, NULL, NULL) == 0;
            bool right = payload_is_right(segment, small, 3, 30) == 1;

            assert_true(!sound || right);
        }
        segment_close(segment);
        assert_false(file_exists(vfs_posix(), tmp));
    }
    assert_int_equal(file_remove_all(vfs_posix(), path, NULL), 0);
    vfs_fault_release(&fault);
}

static void test_no_failing_call_publishes_half_a_segment(void **state)
{
    (void)state;
    previewing = true;
    sweep(&(struct vfs_fault_plan){.errno_value = EIO}, false);
    sweep(&(struct vfs_fault_plan){.errno_value = ENOSPC}, false);
    sweep(&(struct vfs_fault_plan){.call = VFS_CALL_WRITE, .effect = VFS_EFFECT_SHORT}, false);
    sweep(&(struct vfs_fault_plan){.call = VFS_CALL_WRITE,
                                   .effect = VFS_EFFECT_TEAR_ERRNO,
                                   .errno_value = ENOSPC},
          false);
    previewing = false;
}

static void test_a_lying_disk_is_found_out(void **state)
{
    (void)state;
    sweep(&(struct vfs_fault_plan){.call = VFS_CALL_WRITE, .effect = VFS_EFFECT_FORGET}, true);
    sweep(&(struct vfs_fault_plan){.call = VFS_CALL_WRITE, .effect = VFS_EFFECT_TEAR}, true);
    sweep(&(struct vfs_fault_plan){.call = VFS_CALL_WRITE, .effect = VFS_EFFECT_FLIP, .bit = 77},
          true);
}

/* Killed and resumed. The parts: several runs with whole blocks left over, blocks wider than a
 * page, no block at all, blocks as large as a run. */
static const struct part resumed[] = {{"f.pages", SECTION_PAGES, 4096, 260 * 4092 + 100},
                                      {"f.codes", SECTION_CODES, 8192, 20000},
                                      {"stats", SECTION_STATS, 4096, 0},
                                      {"wide", SECTION_ROWS, 1u << 20, 1100000},
                                      {"f.vectors", SECTION_VECTORS, 12288, 10 * 12284}};
#define RESUMED_COUNT 5u
#define CHECKPOINT_EVERY 400000u /* payload bytes */

/* What a resumable build saw. */
struct progress {
    uint64_t begun_at[RESUMED_COUNT]; /* UINT64_MAX: not begun */
    uint64_t safe[RESUMED_COUNT];     /* payload bytes the last checkpoint holds */
    uint32_t safe_sections;           /* whole in the last checkpoint */
};

/* Writes the parts with checkpoints, from where an earlier call was killed. `progress` counts on.
 */
static int write_resumable(struct vfs *vfs, const char *path, uint64_t seed,
                           struct progress *progress, struct error *err)
{
    struct segment_writer *writer = NULL;
    uint8_t id[DIGEST_BYTES];
    uint8_t *data = NULL;
    int rc = -1;

    make_id(id, seed);
    for (uint32_t i = 0; i < RESUMED_COUNT; i++)
        progress->begun_at[i] = UINT64_MAX;
    if (segment_writer_resume(vfs, path, id, 77, &writer, err) < 0)
        goto done;
    for (uint32_t i = 0; i < RESUMED_COUNT; i++) {
        const struct part *part = &resumed[i];
        uint64_t at, held, safe = 0;

        if (segment_writer_has(writer, part->name))
            continue;
        free(data);
        data = payload_of_part(part, seed);
        if (segment_writer_begin_at(writer, part->name, part->kind, part->block_bytes, NULL, &at,
                                    err) < 0)
            goto done;
        progress->begun_at[i] = at;
        for (uint64_t since = 0; at < part->payload_bytes;) {
            uint64_t left = part->payload_bytes - at, bytes = left < 70001 ? left : 70001;

            if (segment_writer_append(writer, data + at, bytes, err) < 0)
                goto done;
            at += bytes;
            since += bytes;
            if (since < CHECKPOINT_EVERY)
                continue;
            since = 0;
            if (segment_writer_checkpoint(writer, &safe, err) < 0)
                goto done;
            assert_int_equal(safe, at - at % (part->block_bytes - BLOCK_CRC_BYTES));
            progress->safe[i] = safe;
            progress->safe_sections = i;
        }
        if (segment_writer_end(writer, err) < 0)
            goto done;
        if (i == 0 && manifest_set_u64(segment_writer_manifest(writer), "f.degree", 32, err) < 0)
            goto done;
        if (i == 3 && segment_writer_preview(writer, err) < 0)
            goto done;
        if (i % 2 == 1)
            continue;
        if (segment_writer_checkpoint(writer, &held, err) < 0)
            goto done;
        assert_int_equal(held, 0);
        progress->safe_sections = i + 1;
    }
    rc = segment_writer_publish(writer, err);
done:
    free(data);
    segment_writer_close(writer);
    return rc;
}

/* The same without checkpoints, by the calls that know nothing of them. */
static void write_undisturbed(const char *path, uint64_t seed)
{
    must_write(path, resumed, RESUMED_COUNT, seed);
}

static void must_be_equal(const char *a, const char *b)
{
    char **names[2];
    uint32_t counts[2];

    assert_int_equal(file_list(vfs_posix(), a, &names[0], &counts[0], NULL), 0);
    assert_int_equal(file_list(vfs_posix(), b, &names[1], &counts[1], NULL), 0);
    assert_int_equal(counts[0], counts[1]);
    for (uint32_t i = 0; i < counts[0]; i++) {
        uint8_t *data[2];
        size_t bytes[2];

        assert_string_equal(names[0][i], names[1][i]);
        read_file(a, names[0][i], &data[0], &bytes[0]);
        read_file(b, names[0][i], &data[1], &bytes[1]);
        assert_int_equal(bytes[0], bytes[1]);
        assert_memory_equal(data[0], data[1], bytes[0]);
        free(data[0]);
        free(data[1]);
    }
    file_names_free(names[0], counts[0]);
    file_names_free(names[1], counts[1]);
}

static int no_sync(struct vfs_file *file, bool data_only)
{
    (void)file;
    (void)data_only;
    return 0;
}

static int no_dirsync(struct vfs *vfs, const char *path)
{
    (void)vfs;
    (void)path;
    return 0;
}

/* The real files without the wait for the disk: a killed process loses nothing by it. */
static struct vfs unsynced_vfs(void)
{
    struct vfs vfs = *vfs_posix();

    vfs.sync = no_sync;
    vfs.dirsync = no_dirsync;
    return vfs;
}

static void kill_sweep(const struct vfs_fault_plan *kind)
{
    struct vfs unsynced = unsynced_vfs();
    struct progress progress = {.safe_sections = 0};
    struct error err = ERROR_INIT;
    struct vfs_fault fault;
    struct random random;
    char path[400], plain[400], tmp[410];
    uint64_t calls;

    path_in(plain, "undisturbed");
    path_in(path, "killed");
    snprintf(tmp, sizeof tmp, "%s.tmp", path);
    write_undisturbed(plain, 50);
    vfs_fault_init(&fault, &unsynced);
    random_init(&random, 50, 0);
    vfs_fault_plan(&fault, NULL);
    if (write_resumable(&fault.vfs, path, 50, &progress, &err) < 0)
        fail_msg("%s", err.message);
    calls = vfs_fault_calls(&fault, VFS_CALL_ANY);
    must_be_equal(plain, path);
    for (uint64_t nth = 1; nth <= calls; nth++) {
        struct vfs_fault_plan plan = *kind;
        bool whole = false;

        assert_int_equal(file_remove_all(vfs_posix(), path, NULL), 0);
        assert_false(file_exists(vfs_posix(), tmp));
        memset(&progress, 0, sizeof progress);
        plan.for_ever = true;
        /* Every third one, and those killed near the end, are killed again while they resume. */
        for (uint32_t kills = 0; kills < (nth % 3 == 0 || nth + 12 > calls ? 2u : 1u) && !whole;
             kills++) {
            struct progress before = progress;

            plan.nth = kills == 0 ? nth : 1 + random_below(&random, 60);
            vfs_fault_plan(&fault, &plan);
            error_clear(&err);
            if (write_resumable(&fault.vfs, path, 50, &progress, &err) == 0)
                whole = true; /* closing failed, and that is not told */
            assert_int_equal(vfs_fault_files_open(&fault), 0);
            for (uint32_t i = 0; i < RESUMED_COUNT; i++) {
                if (progress.begun_at[i] != UINT64_MAX && before.safe_sections == i)
                    assert_true(progress.begun_at[i] >= before.safe[i]);
            }
        }
        if (!whole && !file_exists(vfs_posix(), path)) {
            struct progress before = progress;

            error_clear(&err);
            vfs_fault_plan(&fault, NULL);
            if (write_resumable(&fault.vfs, path, 50, &progress, &err) < 0)
                fail_msg("killed at call %lu: %s", (unsigned long)nth, err.message);
            /* Nothing the last checkpoint held was written again. */
            for (uint32_t i = 0; i < RESUMED_COUNT; i++) {
                if (i < before.safe_sections)
                    assert_true(progress.begun_at[i] == UINT64_MAX);
                else if (i == before.safe_sections)
                    assert_true(progress.begun_at[i] >= before.safe[i]);
            }
        }
        must_be_equal(plain, path);
        assert_int_equal(file_remove_all(vfs_posix(), tmp, NULL), 0);
    }
    assert_int_equal(file_remove_all(vfs_posix(), path, NULL), 0);
    assert_int_equal(file_remove_all(vfs_posix(), plain, NULL), 0);
    vfs_fault_release(&fault);
}

static void test_killed_at_any_call_the_resumed_segment_is_the_same(void **state)
{
    (void)state;
    kill_sweep(&(struct vfs_fault_plan){.errno_value = EIO});
    kill_sweep(&(struct vfs_fault_plan){.effect = VFS_EFFECT_TEAR_ERRNO, .errno_value = EIO});
}

/* A call that fails once, and then the same process tries again. */
static void test_a_failed_call_leaves_what_can_be_resumed(void **state)
{
    struct vfs unsynced = unsynced_vfs();
    struct progress progress = {.safe_sections = 0};
    struct error err = ERROR_INIT;
    struct vfs_fault fault;
    char path[400], plain[400];
    uint64_t calls = UINT64_MAX;

    (void)state;
    path_in(plain, "unfailed");
    path_in(path, "failed");
    write_undisturbed(plain, 51);
    vfs_fault_init(&fault, &unsynced);
    for (uint64_t nth = 1; nth <= calls; nth += 2) {
        bool interrupted = false;

        error_clear(&err);
        vfs_fault_plan(&fault, NULL);
        /* Half of it by one that is killed, so that the one that fails has something to resume. */
        vfs_fault_plan(&fault,
                       &(struct vfs_fault_plan){.nth = 40, .for_ever = true, .errno_value = EIO});
        assert_int_equal(write_resumable(&fault.vfs, path, 51, &progress, NULL), -1);
        vfs_fault_plan(&fault, &(struct vfs_fault_plan){.nth = nth, .errno_value = ENOSPC});
        interrupted = write_resumable(&fault.vfs, path, 51, &progress, &err) < 0;
        calls = vfs_fault_calls(&fault, VFS_CALL_ANY) > nth ? calls : 0;
        vfs_fault_plan(&fault, NULL);
        error_clear(&err);
        if (interrupted && write_resumable(&fault.vfs, path, 51, &progress, &err) < 0)
            fail_msg("call %lu: %s", (unsigned long)nth, err.message);
        assert_int_equal(vfs_fault_files_open(&fault), 0);
        must_be_equal(plain, path);
        assert_int_equal(file_remove_all(vfs_posix(), path, NULL), 0);
    }
    vfs_fault_release(&fault);
}

/* A disk that loses, when the power goes, all that was not synced: written bytes become zeros, and
 * created, renamed and removed names are as they were before. */
struct lossy_write {
    char path[300];
    uint64_t offset, bytes;
};

struct lossy_name {
    char path[300], from[300], grave[300]; /* empty: none */
    bool created;
};

struct lossy_vfs {
    struct vfs vfs;
    char file_paths[8][300]; /* by open file */
    struct vfs_file *files[8];
    struct lossy_write writes[1000];
    uint32_t write_count;
    struct lossy_name names[1000];
    uint32_t name_count;
    uint32_t grave_count;
    uint64_t calls; /* left until the power goes */
};

static bool lossy_alive(struct lossy_vfs *lossy)
{
    if (lossy->calls == 0)
        return false;
    lossy->calls--;
    return true;
}

static struct lossy_name *lossy_name_add(struct lossy_vfs *lossy, const char *path)
{
    struct lossy_name *name = &lossy->names[lossy->name_count++];

    assert_true(lossy->name_count <= 1000);
    memset(name, 0, sizeof *name);
    snprintf(name->path, sizeof name->path, "%s", path);
    return name;
}

static char *lossy_path(struct lossy_vfs *lossy, struct vfs_file *file)
{
    for (uint32_t i = 0; i < 8; i++)
        if (lossy->files[i] == file)
            return lossy->file_paths[i];
    fail_msg("not an open file");
    return NULL;
}

static int lossy_open(struct vfs *vfs, const char *path, unsigned flags, struct vfs_file **out)
{
    struct lossy_vfs *lossy = (struct lossy_vfs *)vfs;
    int rc;

    if (!lossy_alive(lossy))
        return -EIO;
    rc = vfs_posix()->open(vfs, path, flags, out);
    for (uint32_t i = 0; rc == 0 && i < 8; i++) {
        if (lossy->files[i])
            continue;
        lossy->files[i] = *out;
        snprintf(lossy->file_paths[i], sizeof lossy->file_paths[i], "%s", path);
        break;
    }
    if (rc == 0 && flags & VFS_CREATE)
        lossy_name_add(lossy, path)->created = true;
    return rc;
}

static int lossy_close(struct vfs_file *file)
{
    struct lossy_vfs *lossy = (struct lossy_vfs *)file->vfs;

    for (uint32_t i = 0; i < 8; i++)
        if (lossy->files[i] == file)
            lossy->files[i] = NULL;
    return vfs_posix()->close(file);
}

static int lossy_pwrite(struct vfs_file *file, const void *buffer, size_t bytes, uint64_t offset,
                        size_t *put)
{
    struct lossy_vfs *lossy = (struct lossy_vfs *)file->vfs;
    struct lossy_write *write;

    if (!lossy_alive(lossy))
        return -EIO;
    write = &lossy->writes[lossy->write_count++];
    assert_true(lossy->write_count <= 1000);
    snprintf(write->path, sizeof write->path, "%s", lossy_path(lossy, file));
    write->offset = offset;
    write->bytes = bytes;
    return vfs_posix()->pwrite(file, buffer, bytes, offset, put);
}

static int lossy_sync(struct vfs_file *file, bool data_only)
{
    struct lossy_vfs *lossy = (struct lossy_vfs *)file->vfs;
    const char *path = lossy_path(lossy, file);
    uint32_t kept = 0;

    (void)data_only;
    if (!lossy_alive(lossy))
        return -EIO;
    for (uint32_t i = 0; i < lossy->write_count; i++)
        if (strcmp(lossy->writes[i].path, path) != 0)
            lossy->writes[kept++] = lossy->writes[i];
    lossy->write_count = kept;
    return 0;
}

/* Keeps what a name stands for, to have it back. */
static void lossy_bury(struct lossy_vfs *lossy, const char *path, struct lossy_name *name)
{
    snprintf(name->grave, sizeof name->grave, "%s/grave.%u", folder, lossy->grave_count++);
    assert_int_equal(vfs_posix()->link(vfs_posix(), path, name->grave), 0);
    for (uint32_t i = 0; i < lossy->write_count; i++)
        if (strcmp(lossy->writes[i].path, path) == 0)
            snprintf(lossy->writes[i].path, sizeof lossy->writes[i].path, "%s", name->grave);
}

static int lossy_rename(struct vfs *vfs, const char *from, const char *to)
{
    struct lossy_vfs *lossy = (struct lossy_vfs *)vfs;
    struct lossy_name *name;
    struct vfs_stat st;

    if (!lossy_alive(lossy))
        return -EIO;
    name = lossy_name_add(lossy, to);
    snprintf(name->from, sizeof name->from, "%s", from);
    if (vfs_posix()->stat(vfs_posix(), to, &st) == 0 && st.kind == VFS_FILE)
        lossy_bury(lossy, to, name);
    for (uint32_t i = 0; i < lossy->write_count; i++)
        if (strcmp(lossy->writes[i].path, from) == 0)
            snprintf(lossy->writes[i].path, sizeof lossy->writes[i].path, "%s", to);
    return vfs_posix()->rename(vfs_posix(), from, to);
}

static int lossy_unlink(struct vfs *vfs, const char *path)
{
    struct lossy_vfs *lossy = (struct lossy_vfs *)vfs;
    struct vfs_stat st;

    if (!lossy_alive(lossy))
        return -EIO;
    if (vfs_posix()->stat(vfs_posix(), path, &st) == 0 && st.kind == VFS_FILE)
        lossy_bury(lossy, path, lossy_name_add(lossy, path));
    return vfs_posix()->unlink(vfs_posix(), path);
}

static bool is_in(const char *path, const char *parent)
{
    size_t bytes = strlen(parent);

    return strncmp(path, parent, bytes) == 0 && path[bytes] == '/' &&
           !strchr(path + bytes + 1, '/');
}

static int lossy_dirsync(struct vfs *vfs, const char *path)
{
    struct lossy_vfs *lossy = (struct lossy_vfs *)vfs;
    uint32_t kept = 0;

    if (!lossy_alive(lossy))
        return -EIO;
    for (uint32_t i = 0; i < lossy->name_count; i++)
        if (!is_in(lossy->names[i].path, path))
            lossy->names[kept++] = lossy->names[i];
    lossy->name_count = kept;
    return 0;
}

/* The power goes: the changed names are undone from the last one on, and what was written becomes
 * zeros; all of it, or as far as `random` says. */
static void lossy_cut(struct lossy_vfs *lossy, struct random *random)
{
    static uint8_t zeros[2u << 20];

    for (uint32_t i = 0; i < lossy->write_count; i++) {
        struct lossy_write *write = &lossy->writes[i];
        struct vfs_file *file;
        size_t put;

        if ((random && random_below(random, 2)) ||
            vfs_posix()->open(vfs_posix(), write->path, VFS_WRITE, &file) < 0)
            continue;
        assert_true(write->bytes <= sizeof zeros);
        vfs_posix()->pwrite(file, zeros, write->bytes, write->offset, &put);
        vfs_posix()->close(file);
    }
    for (uint32_t i = lossy->name_count; i-- > 0;) {
        struct lossy_name *name = &lossy->names[i];

        if (random && random_below(random, 4) == 0)
            break; /* those before it were written back already */
        if (name->created)
            vfs_posix()->unlink(vfs_posix(), name->path);
        else if (name->from[0])
            vfs_posix()->rename(vfs_posix(), name->path, name->from);
        if (name->grave[0])
            vfs_posix()->rename(vfs_posix(), name->grave, name->path);
    }
    lossy->write_count = lossy->name_count = 0;
}

static void test_what_a_checkpoint_holds_survives_a_power_cut(void **state)
{
    struct lossy_vfs *lossy = calloc(1, sizeof *lossy);
    struct error err = ERROR_INIT;
    struct random random;
    char path[400], plain[400], tmp[410];
    uint64_t nth = 1;

    (void)state;
    path_in(plain, "uncut");
    path_in(path, "cut");
    snprintf(tmp, sizeof tmp, "%s.tmp", path);
    write_undisturbed(plain, 52);
    random_init(&random, 52, 0);
    lossy->vfs = *vfs_posix();
    lossy->vfs.open = lossy_open;
    lossy->vfs.close = lossy_close;
    lossy->vfs.pwrite = lossy_pwrite;
    lossy->vfs.sync = lossy_sync;
    lossy->vfs.rename = lossy_rename;
    lossy->vfs.unlink = lossy_unlink;
    lossy->vfs.dirsync = lossy_dirsync;
    for (bool whole = false; !whole; nth++) {
        struct progress progress = {.safe_sections = 0}, before;

        for (uint32_t cuts = 0; cuts < 1 + nth % 2 && !whole; cuts++) {
            lossy->calls = cuts == 0 ? nth : 1 + random_below(&random, 50);
            before = progress;
            whole = write_resumable(&lossy->vfs, path, 52, &progress, NULL) == 0 && cuts == 0;
            lossy_cut(lossy, nth % 3 == 0 ? NULL : &random);
        }
        before = progress;
        lossy->calls = UINT64_MAX;
        error_clear(&err);
        if (!file_exists(vfs_posix(), path)) {
            if (write_resumable(&lossy->vfs, path, 52, &progress, &err) < 0)
                fail_msg("power cut at call %lu: %s", (unsigned long)nth, err.message);
            for (uint32_t i = 0; i < RESUMED_COUNT; i++) {
                if (i < before.safe_sections)
                    assert_true(progress.begun_at[i] == UINT64_MAX);
                else if (i == before.safe_sections && progress.begun_at[i] != UINT64_MAX)
                    assert_true(progress.begun_at[i] >= before.safe[i]);
            }
            lossy_cut(lossy, NULL); /* published is published */
        }
        must_be_equal(plain, path);
        assert_int_equal(file_remove_all(vfs_posix(), path, NULL), 0);
        assert_int_equal(file_remove_all(vfs_posix(), tmp, NULL), 0);
    }
    assert_true(nth > 60);
    free(lossy);
}

/* A folder with one whole section and `blocks` blocks of a second one in its checkpoint. */
static void leave_checkpoint(const char *path, uint64_t blocks)
{
    struct segment_writer *writer = NULL;
    struct error err = ERROR_INIT;
    uint8_t *data = payload_of_part(&resumed[0], 53);
    uint8_t id[DIGEST_BYTES];
    uint64_t held;
    char tmp[410];

    snprintf(tmp, sizeof tmp, "%s.tmp", path);
    assert_int_equal(file_remove_all(vfs_posix(), path, NULL), 0);
    assert_int_equal(file_remove_all(vfs_posix(), tmp, NULL), 0);
    make_id(id, 53);
    if (segment_writer_resume(vfs_posix(), path, id, 77, &writer, &err) < 0)
        fail_msg("%s", err.message);
    append_part(writer, &resumed[1], 53);
    assert_int_equal(segment_writer_begin(writer, "f.pages", SECTION_PAGES, 4096, NULL), 0);
    assert_int_equal(segment_writer_append(writer, data, blocks * 4092 + 5, NULL), 0);
    if (segment_writer_checkpoint(writer, &held, &err) < 0)
        fail_msg("%s", err.message);
    assert_int_equal(held, blocks * 4092);
    /* In vain, but written. */
    assert_int_equal(segment_writer_append(writer, data, resumed[0].payload_bytes, NULL), 0);
    segment_writer_close(writer);
    assert_true(file_exists(vfs_posix(), tmp));
    free(data);
}

/* Resumes it and says what is there: whether the first section is, and where the second goes on. */
static uint64_t resume_left(const char *path, uint64_t seed, uint64_t rows, bool *has)
{
    struct segment_writer *writer = NULL;
    struct error err = ERROR_INIT;
    uint8_t id[DIGEST_BYTES];
    uint64_t at = UINT64_MAX;

    make_id(id, seed);
    if (segment_writer_resume(vfs_posix(), path, id, rows, &writer, &err) < 0)
        fail_msg("%s", err.message);
    *has = segment_writer_has(writer, "f.codes");
    assert_false(segment_writer_has(writer, "f.pages"));
    if (segment_writer_begin_at(writer, "f.pages", SECTION_PAGES, 4096, NULL, &at, &err) < 0)
        fail_msg("%s", err.message);
    assert_int_equal(segment_writer_offset(writer), at);
    assert_false(segment_writer_has(writer, "f.pages"));
    segment_writer_close(writer);
    return at;
}

static void flip_byte(const char *segment, const char *name, uint64_t at)
{
    uint8_t *data;
    size_t bytes;

    read_file(segment, name, &data, &bytes);
    assert_true(at < bytes);
    data[at] ^= 4;
    replace_file(segment, name, data, bytes);
    free(data);
}

static void test_a_resumed_section_goes_on_behind_its_checkpoint(void **state)
{
    struct segment_writer *writer = NULL;
    uint8_t id[DIGEST_BYTES];
    char path[400], tmp[410], junk[500], name[510];
    uint8_t *data;
    size_t bytes;
    bool has;

    (void)state;
    path_in(path, "left");
    snprintf(tmp, sizeof tmp, "%s.tmp", path);
    leave_checkpoint(path, 200);
    snprintf(junk, sizeof junk, "%s/junk", tmp);
    assert_int_equal(file_mkdir(vfs_posix(), junk, NULL), 0);
    snprintf(name, sizeof name, "%s/f.keys", junk);
    assert_int_equal(file_publish(vfs_posix(), name, "old", 3, NULL), 0);
    assert_int_equal(resume_left(path, 53, 77, &has), 200 * 4092);
    assert_true(has);
    assert_false(file_exists(vfs_posix(), junk));
    /* Resumed twice without a new checkpoint: still there. */
    assert_int_equal(resume_left(path, 53, 77, &has), 200 * 4092);
    leave_checkpoint(path, 0);
    assert_int_equal(resume_left(path, 53, 77, &has), 0);
    assert_true(has);

    /* segment.manifest is as good, as when publishing was killed; and it is one more time. */
    leave_checkpoint(path, 200);
    make_id(id, 53);
    assert_int_equal(segment_writer_resume(vfs_posix(), path, id, 77, &writer, NULL), 0);
    assert_int_equal(segment_writer_preview(writer, NULL), 0);
    segment_writer_close(writer);
    snprintf(name, sizeof name, "%s/.checkpoint", tmp);
    assert_int_equal(file_remove_all(vfs_posix(), name, NULL), 0);
    for (uint32_t i = 0; i < 2; i++) {
        assert_int_equal(resume_left(path, 53, 77, &has), 0);
        assert_true(has);
        assert_true(file_exists(vfs_posix(), name));
    }

    /* Another segment. */
    leave_checkpoint(path, 200);
    assert_int_equal(resume_left(path, 54, 77, &has), 0);
    assert_false(has);
    leave_checkpoint(path, 200);
    assert_int_equal(resume_left(path, 53, 78, &has), 0);
    assert_false(has);

    /* A damaged or missing checkpoint. */
    leave_checkpoint(path, 200);
    flip_byte(tmp, ".checkpoint", 70);
    assert_int_equal(resume_left(path, 53, 77, &has), 0);
    assert_false(has);

    /* A damaged block, the header's excepted: that one is written at the end. */
    leave_checkpoint(path, 200);
    flip_byte(tmp, "f.pages", 200 * 4096 + 17);
    assert_int_equal(resume_left(path, 53, 77, &has), 0);
    assert_true(has);
    leave_checkpoint(path, 200);
    flip_byte(tmp, "f.pages", 17);
    assert_int_equal(resume_left(path, 53, 77, &has), 200 * 4092);

    /* A file that ends too early, and one that is not there. */
    leave_checkpoint(path, 200);
    read_file(tmp, "f.pages", &data, &bytes);
    replace_file(tmp, "f.pages", data, 200 * 4096);
    free(data);
    assert_int_equal(resume_left(path, 53, 77, &has), 0);
    assert_true(has);
    leave_checkpoint(path, 200);
    snprintf(name, sizeof name, "%s/f.pages", tmp);
    assert_int_equal(file_remove_all(vfs_posix(), name, NULL), 0);
    assert_int_equal(resume_left(path, 53, 77, &has), 0);
    assert_true(has);

    /* A whole section of another length or with another header: it and what follows it. */
    leave_checkpoint(path, 200);
    read_file(tmp, "f.codes", &data, &bytes);
    replace_file(tmp, "f.codes", data, bytes - 4096);
    free(data);
    assert_int_equal(resume_left(path, 53, 77, &has), 0);
    assert_false(has);
    leave_checkpoint(path, 200);
    flip_byte(tmp, "f.codes", 20);
    assert_int_equal(resume_left(path, 53, 77, &has), 0);
    assert_false(has);
    assert_int_equal(file_remove_all(vfs_posix(), tmp, NULL), 0);
}

static void test_what_is_begun_otherwise_is_begun_anew(void **state)
{
    static const struct part others[] = {{"f.pages", SECTION_PAGES, 8192, 0},
                                         {"f.pages", SECTION_ROWS, 4096, 0},
                                         {"f.vectors", SECTION_VECTORS, 4096, 0}};
    struct segment_writer *writer = NULL;
    struct job *job = job_new(NULL, NULL);
    struct error err = ERROR_INIT;
    uint8_t id[DIGEST_BYTES];
    char path[400], tmp[410], name[500];
    uint64_t at;

    (void)state;
    path_in(path, "otherwise");
    snprintf(tmp, sizeof tmp, "%s.tmp", path);
    snprintf(name, sizeof name, "%s/f.pages", tmp);
    make_id(id, 53);
    for (uint32_t i = 0; i < 3; i++) {
        leave_checkpoint(path, 9);
        assert_int_equal(segment_writer_resume(vfs_posix(), path, id, 77, &writer, NULL), 0);
        assert_int_equal(segment_writer_begin_at(writer, others[i].name, others[i].kind,
                                                 others[i].block_bytes, NULL, &at, NULL),
                         0);
        assert_int_equal(at, 0);
        assert_true(file_exists(vfs_posix(), name) == (i < 2));
        segment_writer_close(writer);
    }
    /* The calls that know nothing of checkpoints. */
    leave_checkpoint(path, 9);
    assert_int_equal(segment_writer_resume(vfs_posix(), path, id, 77, &writer, NULL), 0);
    assert_int_equal(segment_writer_begin(writer, "f.codes", SECTION_CODES, 8192, NULL), -1);
    assert_int_equal(segment_writer_checkpoint(writer, NULL, NULL), 0); /* keeps what is left */
    assert_int_equal(segment_writer_begin(writer, "f.pages", SECTION_PAGES, 4096, NULL), 0);
    assert_int_equal(segment_writer_offset(writer), 0);
    segment_writer_close(writer);

    leave_checkpoint(path, 9);
    job_cancel(job);
    assert_int_equal(segment_writer_resume(vfs_posix(), path, id, 77, &writer, NULL), 0);
    assert_int_equal(
        segment_writer_begin_at(writer, "f.pages", SECTION_PAGES, 4096, job, &at, &err), -1);
    assert_int_equal(err.code, ERR_CANCELLED);
    assert_int_equal(segment_writer_checkpoint(writer, NULL, NULL), -1);
    segment_writer_close(writer);
    assert_int_equal(segment_writer_resume(vfs_posix(), path, id, 77, &writer, NULL), 0);
    assert_int_equal(segment_writer_checkpoint(writer, NULL, NULL), 0);
    segment_writer_close(writer);
    assert_int_equal(segment_writer_resume(vfs_posix(), path, id, 77, &writer, NULL), 0);
    assert_int_equal(
        segment_writer_begin_at(writer, "f.pages", SECTION_PAGES, 4096, NULL, &at, NULL), 0);
    assert_int_equal(at, 9 * 4092);
    assert_int_equal(segment_writer_end(writer, NULL), 0);
    assert_int_equal(segment_writer_publish(writer, NULL), 0);
    segment_writer_close(writer);
    assert_int_equal(open_code(path), ERR_NONE);
    assert_int_equal(segment_writer_resume(vfs_posix(), path, id, 77, &writer, NULL), -1);
    job_free(job);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_a_segment_comes_back_as_it_was_written),
        cmocka_unit_test(test_any_range_can_be_read_and_none_past_the_end),
        cmocka_unit_test(test_equal_input_gives_equal_files_however_it_is_cut),
        cmocka_unit_test(test_every_flipped_byte_of_every_file_is_found),
        cmocka_unit_test(test_files_of_another_length_are_found_at_open),
        cmocka_unit_test(test_a_missing_section_is_damage_and_a_missing_segment_is_not_found),
        cmocka_unit_test(test_swapped_blocks_are_found_by_read_and_check),
        cmocka_unit_test(test_a_section_of_another_segment_or_place_is_found),
        cmocka_unit_test(test_whole_file_checksums_find_what_blocks_cannot),
        cmocka_unit_test(test_hostile_manifests_are_refused),
        cmocka_unit_test(test_a_burst_returns_what_single_reads_do),
        cmocka_unit_test(test_spans_of_one_block_cost_one_read),
        cmocka_unit_test(test_a_failing_or_flipped_read_fails_the_burst_and_drains_it),
        cmocka_unit_test(test_a_cancelled_check_says_so),
        cmocka_unit_test(test_the_writer_refuses_what_it_cannot_do),
        cmocka_unit_test(test_a_leftover_tmp_is_replaced_and_an_unpublished_one_removed),
        cmocka_unit_test(test_a_preview_opens_and_the_writer_goes_on),
        cmocka_unit_test(test_a_preview_that_is_not_published_leaves_nothing),
        cmocka_unit_test(test_a_copied_segment_is_the_same_segment),
        cmocka_unit_test(test_no_failing_call_publishes_half_a_segment),
        cmocka_unit_test(test_a_lying_disk_is_found_out),
        cmocka_unit_test(test_a_resumed_section_goes_on_behind_its_checkpoint),
        cmocka_unit_test(test_what_is_begun_otherwise_is_begun_anew),
        cmocka_unit_test(test_killed_at_any_call_the_resumed_segment_is_the_same),
        cmocka_unit_test(test_a_failed_call_leaves_what_can_be_resumed),
        cmocka_unit_test(test_what_a_checkpoint_holds_survives_a_power_cut),
    };

    return cmocka_run_group_tests_name("segment", tests, make_folder, remove_folder);
}
