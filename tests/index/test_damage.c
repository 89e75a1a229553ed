/* Every byte of an index, one bit at a time, and every block: cut off, zeroed, swapped, grown by a
 * byte. index_directory_check must find each, and whoever reads the damaged index (searches,
 * vectors, keys, rows) must get an error or the undamaged answer.
 *
 * test_flip does the same through real files and the search engine, for a sample of the bytes; here
 * the files are in memory, which makes every byte affordable. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "index/disk_search.h"
#include "index/index_directory.h"
#include "index/segment_build.h"
#include "storage/base/random.h"
#include "storage/file.h"

#define SEED 20260305u
#define ROWS 260u
#define DIM 4u
#define QUERIES 3u
#define K 10u
#define LIST 40u
#define CELLS 4u
#define FILES_MAX 16u
#define RECORD_BYTES_ALL (64u * ROWS)
/* Of sections larger than this, only each READ_STEP-th flip is also searched with; all are checked.
 */
#define READ_ALL_BYTES 4096u
#define READ_STEP 16u
#define WHERE "memory" /* the index directory's path */

/* ---- files in memory ---- */

struct image {
    char name[128]; /* under WHERE */
    uint8_t *data;  /* bytes + 1 allocated, for the byte too many */
    size_t bytes;
};

struct memory_file {
    struct vfs_file file;
    const struct image *image;
};

static struct image images[FILES_MAX];
static uint32_t image_count;

static const struct image *image_find(const char *path)
{
    size_t prefix = strlen(WHERE "/");

    if (strncmp(path, WHERE "/", prefix))
        return NULL;
    for (uint32_t i = 0; i < image_count; i++)
        if (!strcmp(images[i].name, path + prefix))
            return &images[i];
    return NULL;
}

static int memory_open(struct vfs *vfs, const char *path, unsigned flags, struct vfs_file **out)
{
    const struct image *image = image_find(path);
    struct memory_file *file;

    if (flags & ~(unsigned)(VFS_READ | VFS_DIRECT))
        return -EROFS;
    if (!image)
        return -ENOENT;
    file = malloc(sizeof *file);
    if (!file)
        return -ENOMEM;
    *file = (struct memory_file){{vfs, -1}, image};
    *out = &file->file;
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
    const struct image *image = ((struct memory_file *)file)->image;

    *got = 0;
    if (offset >= image->bytes)
        return 0;
    *got = image->bytes - offset < bytes ? image->bytes - offset : bytes;
    memcpy(buffer, image->data + offset, *got);
    return 0;
}

static int memory_size(struct vfs_file *file, uint64_t *bytes)
{
    *bytes = ((struct memory_file *)file)->image->bytes;
    return 0;
}

static int memory_stat(struct vfs *vfs, const char *path, struct vfs_stat *out)
{
    const struct image *image = image_find(path);

    (void)vfs;
    if (!image)
        return -ENOENT;
    *out = (struct vfs_stat){.kind = VFS_FILE, .bytes = image->bytes};
    return 0;
}

static struct vfs memory = {.open = memory_open,
                            .close = memory_close,
                            .pread = memory_pread,
                            .size = memory_size,
                            .stat = memory_stat};

/* ---- the index ---- */

static float rows_data[ROWS * DIM], queries[QUERIES * DIM];
static int64_t key_data[ROWS];
static struct walk_scratch *scratch;
static struct disk_search *searcher;
static struct reader *reader;

static int record_of_row(void *context, uint64_t row, struct record_buffer *out, struct error *err)
{
    char text[64];
    int bytes = snprintf(text, sizeof text, "{\"width\":%llu,\"label\":\"l%llu\"}",
                         (unsigned long long)row * 7, (unsigned long long)row % 13);

    return record_from_json(context, text, (size_t)bytes, NULL, 0, out, err);
}

static void build_to_memory(void)
{
    struct segment_build_params params = {.metric = METRIC_COSINE, /* so that there are originals */
                                          .code = CODE_PQ,
                                          .code_bytes = 2,
                                          .max_degree = 16,
                                          .build_list = 32,
                                          .alpha = 1.2f,
                                          .seed = 1,
                                          .keep_originals = true,
                                          .calibrate_vectors = queries,
                                          .calibrate_count = QUERIES};
    char folder[64], path[FILE_PATH_MAX], **names;
    const char *tmp = getenv("TMPDIR"), *segment_name;
    struct segment_build_rows rows = {.int64_keys = key_data, .record = record_of_row};
    struct segment_build_result result;
    struct vector_source *source = NULL;
    struct schema *schema = NULL;
    struct error err = ERROR_INIT;
    struct random random;
    uint32_t count = 0;

    snprintf(folder, sizeof folder, "%.40s/annd-test-XXXXXX", tmp ? tmp : "/var/tmp");
    assert_non_null(mkdtemp(folder));
    random_init(&random, SEED, 0);
    for (uint32_t i = 0; i < ROWS * DIM; i++)
        rows_data[i] = random_normal(&random);
    for (uint32_t i = 0; i < QUERIES * DIM; i++)
        queries[i] = random_normal(&random);
    for (uint32_t i = 0; i < ROWS; i++)
        key_data[i] = (int64_t)random_u64(&random);
    if (schema_default("id", FIELD_INT64, 0, "vector", FIELD_FLOAT_VECTOR, DIM, &schema, &err) <
            0 ||
        vector_source_open_memory(rows_data, ELEMENT_F32, ROWS, DIM, "rows", &source, &err) < 0)
        fail_msg("%s", err.message);
    rows.schema = schema;
    rows.context = schema;
    if (segment_build(vfs_posix(), folder, source, &rows, &params, NULL, NULL, NULL, &result,
                      &err) < 0)
        fail_msg("%s", err.message);
    segment_name = result.name;
    if (index_directory_publish(vfs_posix(), folder, schema, &segment_name, 1, &err) < 0 ||
        index_directory_files(vfs_posix(), folder, &names, &count, &err) < 0)
        fail_msg("%s", err.message);
    assert_in_range(count, 9, FILES_MAX); /* all kinds of section are there */
    for (image_count = 0; image_count < count; image_count++) {
        struct image *image = &images[image_count];
        uint8_t *data = NULL;

        snprintf(image->name, sizeof image->name, "%s", names[image_count]);
        if (file_path_join(path, folder, names[image_count], &err) < 0 ||
            file_read_whole(vfs_posix(), path, 16u << 20, &data, &image->bytes, &err) < 0)
            fail_msg("%s", err.message);
        image->data = calloc(1, image->bytes + 1);
        assert_non_null(image->data);
        memcpy(image->data, data, image->bytes);
        free(data);
    }
    file_names_free(names, count);
    file_remove_all(vfs_posix(), folder, NULL);
    schema_free(schema);
    vector_source_close(source);
}

/* ---- reading all of it ---- */

enum part { PART_SEARCH, PART_VECTORS, PART_KEYS, PART_FIND, PART_ROWS, PART_COUNT };

static const char *const part_names[] = {"search", "vectors", "keys", "find", "rows"};

/* What the parts answered; rc -1 with the error where they did not. */
struct answers {
    int rc[PART_COUNT];
    struct error errors[PART_COUNT];
    struct search_hit hits[QUERIES * K];
    float vectors[ROWS * DIM];
    int64_t keys[ROWS];
    uint32_t positions[ROWS];
    uint32_t record_ends[ROWS];
    uint8_t records[RECORD_BYTES_ALL];
};

/* The reads are done here, one after the other: a thread less to wait for in each of so many runs.
 */
static int search(const struct disk_index *index, struct search_hit *hits, struct error *err)
{
    const struct search_params params = {
        .k = K, .rule = {.search_list = LIST, .cells = CELLS}, .beam_width = 4};
    struct error ignored = ERROR_INIT;

    for (uint32_t q = 0; q < QUERIES; q++) {
        if (disk_search_begin(searcher, index, queries + q * DIM, &params, err) < 0)
            return -1;
        for (uint32_t steps = 0; !disk_search_done(searcher); steps++) {
            struct reader_read *reads[8];
            uint32_t count = disk_search_wanted(searcher, reads, 8);

            assert_true(steps < 10000);
            for (uint32_t i = 0; i < count; i++) {
                size_t got;

                reads[i]->file->vfs->pread(reads[i]->file, reads[i]->buffer, reads[i]->bytes,
                                           reads[i]->offset, &got);
                reads[i]->error = got == reads[i]->bytes ? 0 : EIO;
                disk_search_arrived(searcher, reads[i], &ignored);
            }
        }
        if (disk_search_error(searcher, err) < 0)
            return -1;
        if (disk_search_hits(searcher, hits + q * K, K) != K)
            return error_set(err, ERR_INTERNAL, "fewer than k hits");
    }
    return 0;
}

static int rows_read(const struct index_segment *segment, const uint32_t *positions,
                     struct answers *a, struct error *err)
{
    struct rows_record records[ROWS];
    uint32_t bytes = 0;
    uint8_t *storage;

    if (rows_fetch(segment->rows, reader, positions, ROWS, records, &storage, err) < 0)
        return -1;
    for (uint32_t i = 0; i < ROWS; i++) {
        if (records[i].bytes > sizeof a->records - bytes)
            fail_msg("row %u has %u bytes", i, records[i].bytes);
        memcpy(a->records + bytes, records[i].data, records[i].bytes);
        bytes += records[i].bytes;
        a->record_ends[i] = bytes;
    }
    free(storage);
    return 0;
}

static void read_all(struct answers *a)
{
    struct index_directory *directory = NULL;
    struct error err = ERROR_INIT;
    uint32_t positions[ROWS], found[ROWS];
    uint64_t ordinals[ROWS];

    memset(a, 0, sizeof *a);
    if (index_directory_open(&memory, WHERE, 0, true, &directory, &err) < 0) {
        for (int part = 0; part < PART_COUNT; part++) {
            a->rc[part] = -1;
            a->errors[part] = err;
        }
        return;
    }
    const struct index_segment *segment = &directory->segments[0];

    for (uint32_t i = 0; i < ROWS; i++) {
        positions[i] = i;
        ordinals[i] = key_ordinal_int64(key_data[i]);
    }
    a->rc[PART_SEARCH] = search(segment->fields[0], a->hits, &a->errors[PART_SEARCH]);
    a->rc[PART_VECTORS] = disk_index_vectors(segment->fields[0], reader, positions, ROWS,
                                             a->vectors, &a->errors[PART_VECTORS]);
    a->rc[PART_KEYS] = disk_index_keys(segment->fields[0], reader, positions, ROWS, a->keys,
                                       &a->errors[PART_KEYS]);
    a->rc[PART_FIND] = keys_find(segment->keys, reader, ordinals, ROWS, 1, a->positions, found,
                                 &a->errors[PART_FIND]);
    for (uint32_t i = 0; i < ROWS && !a->rc[PART_FIND]; i++)
        if (found[i] != 1)
            a->positions[i] = UINT32_MAX; /* a wrong answer */
    a->rc[PART_ROWS] = rows_read(segment, positions, a, &a->errors[PART_ROWS]);
    index_directory_close(directory);
}

static bool part_same(const struct answers *a, const struct answers *b, enum part part)
{
    switch (part) {
    case PART_SEARCH:
        for (uint32_t i = 0; i < QUERIES * K; i++)
            if (a->hits[i].position != b->hits[i].position || a->hits[i].key != b->hits[i].key ||
                memcmp(&a->hits[i].distance, &b->hits[i].distance, sizeof(float)))
                return false;
        return true;
    case PART_VECTORS:
        return !memcmp(a->vectors, b->vectors, sizeof a->vectors);
    case PART_KEYS:
        return !memcmp(a->keys, b->keys, sizeof a->keys);
    case PART_FIND:
        return !memcmp(a->positions, b->positions, sizeof a->positions);
    case PART_ROWS:
        return !memcmp(a->record_ends, b->record_ends, sizeof a->record_ends) &&
               !memcmp(a->records, b->records, sizeof a->records);
    case PART_COUNT:
        break;
    }
    return false;
}

/* ---- damage ---- */

static struct answers good, seen;
static uint32_t damages, errors_seen;

static bool code_is_damage(enum error_code code)
{
    return code == ERR_CORRUPT || code == ERR_UNSUPPORTED;
}

/* The index is damaged as `what` says: nobody may be deceived. */
static void assert_found_out(const struct image *image, const char *what, uint64_t at, bool read)
{
    struct error err = ERROR_INIT;
    struct index_check found;

    damages++;
    if (index_directory_check(&memory, WHERE, NULL, &found, &err) == 0)
        fail_msg("%s: %s at %llu: the check finds nothing", image->name, what,
                 (unsigned long long)at);
    if (!code_is_damage(err.code) || !strstr(err.message, WHERE))
        fail_msg("%s: %s at %llu: the check says %s: %s", image->name, what, (unsigned long long)at,
                 error_code_name(err.code), err.message);
    if (!read)
        return;
    read_all(&seen);
    for (int part = 0; part < PART_COUNT; part++) {
        if (seen.rc[part] < 0) {
            errors_seen++;
            if (!code_is_damage(seen.errors[part].code))
                fail_msg("%s: %s at %llu: %s says %s: %s", image->name, what,
                         (unsigned long long)at, part_names[part],
                         error_code_name(seen.errors[part].code), seen.errors[part].message);
        } else if (!part_same(&seen, &good, (enum part)part)) {
            fail_msg("%s: %s at %llu: %s gives another answer", image->name, what,
                     (unsigned long long)at, part_names[part]);
        }
    }
}

static void assert_undamaged(void)
{
    struct error err = ERROR_INIT;
    struct index_check found;

    if (index_directory_check(&memory, WHERE, NULL, &found, &err) < 0)
        fail_msg("%s", err.message);
    assert_int_equal(found.nodes, ROWS);
    read_all(&seen);
    for (int part = 0; part < PART_COUNT; part++) {
        if (seen.rc[part] < 0)
            fail_msg("%s: %s", part_names[part], seen.errors[part].message);
        if (!part_same(&seen, &good, (enum part)part))
            fail_msg("%s gives another answer than before", part_names[part]);
    }
}

static int group_setup(void **state)
{
    struct error err = ERROR_INIT;
    struct index_directory *directory;

    (void)state;
    build_to_memory();
    if (index_directory_open(&memory, WHERE, 0, true, &directory, &err) < 0)
        fail_msg("%s", err.message);
    const struct disk_index *index = directory->segments[0].fields[0];
    struct disk_search_limits limits = {
        .search_list_max = LIST, .cells_max = CELLS, .k_max = K, .beam_width = 4};

    disk_search_limits_raise(&limits, index);
    assert_non_null(directory->segments[0].rows);
    assert_non_null(index->originals);
    if (walk_scratch_new(&limits, &scratch, &err) < 0 ||
        disk_search_new(&limits, scratch, &searcher, &err) < 0 ||
        reader_open(READER_PREAD, 64, &reader, &err) < 0)
        fail_msg("%s", err.message);
    index_directory_close(directory);
    read_all(&good);
    assert_undamaged();
    for (uint32_t i = 0; i < ROWS; i++) /* and it is the right answer */
        assert_int_equal(good.keys[good.positions[i]], key_data[i]);
    return 0;
}

static int group_teardown(void **state)
{
    (void)state;
    disk_search_free(searcher);
    walk_scratch_free(scratch);
    reader_close(reader);
    for (uint32_t i = 0; i < image_count; i++)
        free(images[i].data);
    return 0;
}

static void test_a_flipped_bit_of_any_byte_is_found(void **state)
{
    struct random random;

    (void)state;
    damages = errors_seen = 0;
    random_init(&random, SEED, 1);
    for (uint32_t i = 0; i < image_count; i++) {
        struct image *image = &images[i];

        for (size_t at = 0; at < image->bytes; at++) {
            uint8_t mask = (uint8_t)(1u << random_below(&random, 8));

            image->data[at] ^= mask;
            assert_found_out(image, "a flipped bit", at,
                             image->bytes <= READ_ALL_BYTES || at % READ_STEP == 0);
            image->data[at] ^= mask;
        }
    }
    print_message("# %u flips, %u errors met by readers\n", damages, errors_seen);
    assert_undamaged();
}

static void test_every_bit_of_the_headers_is_found(void **state)
{
    (void)state;
    for (uint32_t i = 0; i < image_count; i++)
        for (size_t bit = 0; bit < 8 * 128u && bit < 8 * images[i].bytes; bit++) {
            images[i].data[bit / 8] ^= (uint8_t)(1u << bit % 8);
            assert_found_out(&images[i], "a flipped bit of the header, bit", bit, false);
            images[i].data[bit / 8] ^= (uint8_t)(1u << bit % 8);
        }
    assert_undamaged();
}

static void test_a_file_that_is_shorter_or_longer_is_found(void **state)
{
    (void)state;
    for (uint32_t i = 0; i < image_count; i++) {
        struct image *image = &images[i];
        size_t bytes = image->bytes;

        for (size_t at = 0; at < bytes; at += FILE_BLOCK_BYTES) {
            image->bytes = at;
            assert_found_out(image, "cut", at, true);
        }
        image->bytes = bytes - 1;
        assert_found_out(image, "cut", bytes - 1, true);
        image->bytes = bytes + 1; /* a zero */
        assert_found_out(image, "grown", bytes, true);
        image->bytes = bytes;
    }
    assert_undamaged();
}

static void test_a_block_that_is_zeroed_or_in_anothers_place_is_found(void **state)
{
    uint8_t block[FILE_BLOCK_BYTES];

    (void)state;
    for (uint32_t i = 0; i < image_count; i++) {
        struct image *image = &images[i];

        for (size_t at = 0; at < image->bytes; at += FILE_BLOCK_BYTES) {
            size_t bytes = image->bytes - at < sizeof block ? image->bytes - at : sizeof block;
            uint8_t *here = image->data + at;

            memcpy(block, here, bytes);
            memset(here, 0, bytes);
            assert_found_out(image, "zeros", at, true);
            memset(here, 0xff, bytes);
            assert_found_out(image, "ones", at, true);
            memcpy(here, block, bytes);
            for (size_t other = at + sizeof block; other + sizeof block <= image->bytes;
                 other += sizeof block) {
                uint8_t *there = image->data + other;

                memcpy(here, there, sizeof block);
                assert_found_out(image, "another block's copy", at, true);
                memcpy(there, block, sizeof block);
                assert_found_out(image, "swapped blocks", at, true);
                memcpy(there, here, sizeof block);
                memcpy(here, block, sizeof block);
            }
        }
    }
    assert_undamaged();
}

static void test_a_file_that_is_gone_or_anothers_is_found(void **state)
{
    char name[sizeof images[0].name];

    (void)state;
    for (uint32_t i = 0; i < image_count; i++) {
        struct image kept = images[i];

        if (strcmp(images[i].name, "MANIFEST")) { /* without it there is no index to damage */
            memcpy(name, images[i].name, sizeof name);
            images[i].name[0] = '\0';
            assert_found_out(&images[i], "gone: file", i, true);
            memcpy(images[i].name, name, sizeof name);
        }
        for (uint32_t j = 0; j < image_count; j++) {
            if (j == i)
                continue;
            images[i].data = images[j].data;
            images[i].bytes = images[j].bytes;
            assert_found_out(&images[i], "holds the content of file", j, true);
            images[i] = kept;
        }
    }
    assert_undamaged();
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_a_flipped_bit_of_any_byte_is_found),
        cmocka_unit_test(test_every_bit_of_the_headers_is_found),
        cmocka_unit_test(test_a_file_that_is_shorter_or_longer_is_found),
        cmocka_unit_test(test_a_block_that_is_zeroed_or_in_anothers_place_is_found),
        cmocka_unit_test(test_a_file_that_is_gone_or_anothers_is_found),
    };

    return cmocka_run_group_tests_name("damage", tests, group_setup, group_teardown);
}
