/* storage/base: errors, bytes, digests, arenas, random numbers, threads, jobs. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <errno.h>
#include <math.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "storage/base/arena.h"
#include "storage/base/bytes.h"
#include "storage/base/digest.h"
#include "storage/base/error.h"
#include "storage/base/job.h"
#include "storage/base/pool.h"
#include "storage/base/random.h"

/* errors */

static void test_the_first_error_wins(void **state)
{
    struct error err = ERROR_INIT;

    (void)state;
    assert_int_equal(error_set(&err, ERR_CORRUPT, "block %d", 7), -1);
    assert_int_equal(error_set(&err, ERR_IO, "later"), -1);
    assert_int_equal(error_set_errno(&err, ENOENT, "later still"), -1);
    assert_int_equal(err.code, ERR_CORRUPT);
    assert_string_equal(err.message, "block 7");
    error_clear(&err);
    assert_int_equal(err.code, ERR_NONE);
    assert_string_equal(err.message, "");
    error_set(&err, ERR_IO, "again");
    assert_string_equal(err.message, "again");
}

static void test_a_null_error_is_accepted(void **state)
{
    (void)state;
    assert_int_equal(error_set(NULL, ERR_IO, "x"), -1);
    assert_int_equal(error_set_errno(NULL, EIO, "x"), -1);
    assert_int_equal(error_prefix(NULL, "x"), -1);
    error_remedy(NULL, "x");
    error_clear(NULL);
}

static void test_errno_becomes_the_right_code(void **state)
{
    static const struct {
        int errno_value;
        enum error_code code;
    } cases[] = {
        {ENOSPC, ERR_NO_SPACE},  {EDQUOT, ERR_NO_SPACE},  {EACCES, ERR_PERMISSION},
        {EPERM, ERR_PERMISSION}, {EROFS, ERR_PERMISSION}, {ENOENT, ERR_NOT_FOUND},
        {EEXIST, ERR_EXISTS},    {ENOMEM, ERR_NOMEM},     {EWOULDBLOCK, ERR_BUSY},
        {EIO, ERR_IO},           {EMFILE, ERR_IO},        {EINTR, ERR_IO},
        {-ENOSPC, ERR_NO_SPACE},
    };

    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct error err = ERROR_INIT;

        error_set_errno(&err, cases[i].errno_value, "file %s", "f");
        assert_int_equal(err.code, cases[i].code);
        assert_memory_equal(err.message, "file f: ", 8);
        assert_non_null(strstr(err.message, strerror(abs(cases[i].errno_value))));
    }
}

static void test_prefix_and_remedy_frame_the_message(void **state)
{
    struct error err = ERROR_INIT;

    (void)state;
    error_prefix(&err, "unset");
    error_remedy(&err, "unset");
    assert_string_equal(err.message, "");
    error_set(&err, ERR_CORRUPT, "bad magic");
    error_remedy(&err, "restore %s", "it");
    assert_int_equal(error_prefix(&err, "segment %u", 3u), -1);
    assert_string_equal(err.message, "segment 3: bad magic\n  to mend: restore it");
    assert_int_equal(err.code, ERR_CORRUPT);
}

/* Enough of a check for text that was valid before it was cut. */
static bool is_whole_utf8(const char *text)
{
    while (*text) {
        unsigned char lead = (unsigned char)*text++;
        int more = lead < 0x80u ? 0 : lead < 0xC0u ? -1 : lead < 0xE0u ? 1 : lead < 0xF0u ? 2 : 3;

        if (more < 0)
            return false;
        for (; more > 0; more--, text++)
            if (((unsigned char)*text & 0xC0u) != 0x80u)
                return false;
    }
    return true;
}

static void test_a_long_message_is_cut_between_characters(void **state)
{
    char text[2 * sizeof((struct error *)0)->message];

    (void)state;
    /* Every way the cut can fall on 2-, 3- and 4-byte characters. */
    for (int width = 2; width <= 4; width++) {
        const char *character = width == 2   ? "\xC3\xA4"
                                : width == 3 ? "\xE2\x82\xAC"
                                             : "\xF0\x9F\x98\x80";
        for (int lead = 0; lead < width; lead++) {
            struct error err = ERROR_INIT;
            size_t length = 0;

            for (; length < (size_t)lead; length++)
                text[length] = 'a';
            for (; length + (size_t)width < sizeof text; length += (size_t)width)
                memcpy(text + length, character, (size_t)width);
            text[length] = '\0';
            error_set(&err, ERR_IO, "%s", text);
            length = strlen(err.message);
            assert_true(length > sizeof err.message - 5 && length < sizeof err.message);
            assert_int_equal((length - (size_t)lead) % (size_t)width, 0);
            error_prefix(&err, "b");
            error_remedy(&err, "c");
            assert_true(strlen(err.message) < sizeof err.message);
            assert_true(is_whole_utf8(err.message));
        }
    }
    /* Bytes that are no UTF-8 are kept as they are. */
    {
        struct error err = ERROR_INIT;

        memset(text, 0x80, sizeof text - 1);
        text[sizeof text - 1] = '\0';
        error_set(&err, ERR_IO, "%s", text);
        assert_int_equal(strlen(err.message), sizeof err.message - 1);
    }
}

static void test_every_code_has_a_name(void **state)
{
    (void)state;
    for (int code = 0; code < ERR_COUNT; code++)
        assert_memory_equal(error_code_name((enum error_code)code), "ERR_", 4);
    assert_string_equal(error_code_name(ERR_CORRUPT), "ERR_CORRUPT");
    assert_string_equal(error_code_name(ERR_INTERNAL), "ERR_INTERNAL");
    assert_string_equal(error_code_name(ERR_COUNT), "ERR_?");
}

/* bytes */

static void fill(uint8_t *data, size_t bytes, uint64_t seed)
{
    struct random random;

    random_init(&random, seed, 0);
    for (size_t i = 0; i < bytes; i++)
        data[i] = (uint8_t)random_u64(&random);
}

static void test_loads_and_stores_are_little_endian(void **state)
{
    uint8_t b[9] = {0};

    (void)state;
    store_u64(b + 1, UINT64_C(0x0807060504030201));
    for (uint8_t i = 1; i <= 8; i++)
        assert_int_equal(b[i], i);
    assert_int_equal(load_u16(b + 1), 0x0201);
    assert_int_equal(load_u32(b + 1), 0x04030201);
    assert_true(load_u64(b + 1) == UINT64_C(0x0807060504030201));
    store_f32(b + 1, 1.0f);
    assert_int_equal(load_u32(b + 1), 0x3F800000);
    assert_true(load_f32(b + 1) == 1.0f);
    store_f64(b + 1, -2.0);
    assert_true(load_f64(b + 1) == -2.0);
}

static void test_size_arithmetic_reports_overflow(void **state)
{
    uint64_t out;

    (void)state;
    assert_true(size_mul(UINT64_C(1) << 32, UINT32_MAX, &out));
    assert_false(size_mul(UINT64_C(1) << 32, UINT64_C(1) << 32, &out));
    assert_true(size_add(UINT64_MAX - 1, 1, &out));
    assert_true(out == UINT64_MAX);
    assert_false(size_add(UINT64_MAX, 1, &out));
    assert_int_equal(align_up(0, 4096), 0);
    assert_int_equal(align_up(1, 4096), 4096);
    assert_int_equal(align_up(4096, 4096), 4096);
}

static void test_crc32c_matches_the_known_answers(void **state)
{
    uint8_t data[32];

    (void)state;
    assert_int_equal(crc32c(0, "123456789", 9), 0xE3069283u);
    assert_int_equal(crc32c_portable(0, "123456789", 9), 0xE3069283u);
    assert_int_equal(crc32c(0, "", 0), 0);
    /* RFC 3720, B.4 */
    memset(data, 0, sizeof data);
    assert_int_equal(crc32c(0, data, sizeof data), 0x8A9136AAu);
    memset(data, 0xFF, sizeof data);
    assert_int_equal(crc32c(0, data, sizeof data), 0x62A8AB43u);
    for (uint8_t i = 0; i < 32; i++)
        data[i] = i;
    assert_int_equal(crc32c(0, data, sizeof data), 0x46DD794Eu);
}

static void test_fast_crc32c_agrees_with_the_portable_one(void **state)
{
    enum { BYTES = 13000 };
    uint8_t *data = malloc(BYTES + 16);

    (void)state;
    assert_non_null(data);
    fill(data, BYTES + 16, 1);
    for (size_t bytes = 0; bytes <= BYTES; bytes += bytes < 1200 ? 1 : 37) {
        size_t shift = bytes % 16;
        uint32_t start = (uint32_t)(bytes * 2654435761u);

        if (crc32c(start, data + shift, bytes) != crc32c_portable(start, data + shift, bytes))
            fail_msg("differs at %zu bytes, shift %zu", bytes, shift);
    }
    free(data);
}

/* Whatever a page or what is in it starts at: a stretch is cut in three, and has a tail. */
static void test_fast_crc32c_agrees_for_all_lengths_up_to_a_page_wherever_they_start(void **state)
{
    enum { BYTES = 4200, SHIFTS = 8 };
    uint8_t *data = malloc(BYTES + SHIFTS);

    (void)state;
    assert_non_null(data);
    fill(data, BYTES + SHIFTS, 3);
    for (size_t shift = 0; shift < SHIFTS; shift++) {
        uint32_t want = 0;

        for (size_t bytes = 0; bytes <= BYTES; bytes++) {
            if (crc32c(0, data + shift, bytes) != want)
                fail_msg("differs at %zu bytes, shift %zu", bytes, shift);
            want = crc32c_portable(want, data + shift + bytes, bytes < BYTES);
        }
    }
    free(data);
}

static void test_crc32c_of_pieces_is_that_of_the_whole(void **state)
{
    enum { BYTES = 9000 };
    uint8_t *data = malloc(BYTES);
    uint32_t whole;

    (void)state;
    assert_non_null(data);
    fill(data, BYTES, 2);
    whole = crc32c(0, data, BYTES);
    for (size_t cut = 0; cut <= BYTES; cut += 45) {
        uint32_t a = crc32c(0, data, cut);
        uint32_t b = crc32c(0, data + cut, BYTES - cut);

        assert_int_equal(crc32c(a, data + cut, BYTES - cut), whole);
        assert_int_equal(crc32c_combine(a, b, BYTES - cut), whole);
    }
    free(data);
}

static void test_crc32c_combine_takes_huge_lengths(void **state)
{
    /* B: 2^40 bytes in two halves, combined in either order of brackets. */
    uint64_t half = UINT64_C(1) << 39;
    uint32_t a = 0x12345678u, b = 0x9ABCDEF0u, c = 0x0BADF00Du;
    uint32_t left = crc32c_combine(crc32c_combine(a, b, half), c, half);
    uint32_t right = crc32c_combine(a, crc32c_combine(b, c, half), 2 * half);

    (void)state;
    assert_int_equal(left, right);
}

/* digests */

static void test_sha256_matches_the_known_answers(void **state)
{
    static const char text[] = "abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq";
    uint8_t out[DIGEST_BYTES];
    char hex[2 * DIGEST_BYTES + 1];
    struct digest *digest = digest_new();

    (void)state;
    assert_non_null(digest);
    digest_finish(digest, out);
    digest_hex(out, sizeof out, hex);
    assert_string_equal(hex, "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
    digest = digest_new();
    assert_non_null(digest);
    /* in pieces, an empty one among them */
    digest_update(digest, text, 10);
    digest_update(digest, NULL, 0);
    digest_update(digest, text + 10, sizeof text - 1 - 10);
    digest_finish(digest, out);
    digest_hex(out, sizeof out, hex);
    assert_string_equal(hex, "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
    digest_hex(out, 0, hex);
    assert_string_equal(hex, "");
}

static void test_key_hash_is_xxh3_with_seed_0(void **state)
{
    uint8_t key[8];

    (void)state;
    assert_true(key_hash("", 0) == UINT64_C(0x2d06800538d394c2));
    assert_true(key_hash("abc", 3) == UINT64_C(0x78af5f94892f3950));
    assert_int_equal(key_slot(0), 0);
    assert_int_equal(key_slot(UINT64_MAX), KEY_SLOT_COUNT - 1);
    assert_int_equal(key_slot(UINT64_C(0x123) << 52), 0x123);
    /* int64 keys 0, 1, 2, ... spread over the slots */
    {
        static uint32_t seen[KEY_SLOT_COUNT];

        for (uint64_t i = 0; i < 16 * KEY_SLOT_COUNT; i++) {
            store_u64(key, i);
            seen[key_slot(key_hash(key, sizeof key))]++;
        }
        for (uint32_t slot = 0; slot < KEY_SLOT_COUNT; slot++)
            assert_in_range(seen[slot], 1, 48);
    }
}

/* arenas */

static void test_arena_grants_are_aligned_zeroed_and_apart(void **state)
{
    struct arena arena;
    uint8_t *grants[300];
    size_t sizes[300];
    struct random random;

    (void)state;
    arena_init(&arena, (size_t)16 << 20);
    random_init(&random, 3, 0);
    /* Twice: the second round may get memory that the first one wrote to. */
    for (int round = 0; round < 2; round++) {
        for (int i = 0; i < 300; i++) {
            sizes[i] = (size_t)random_below(&random, i % 10 == 0 ? 100000 : 1000);
            grants[i] = arena_alloc(&arena, sizes[i]);
            assert_non_null(grants[i]);
            assert_int_equal((uintptr_t)grants[i] % 64, 0);
            for (size_t at = 0; at < sizes[i]; at++)
                assert_int_equal(grants[i][at], 0);
            memset(grants[i], i & 0xFF, sizes[i]);
        }
        for (int i = 0; i < 300; i++)
            for (size_t at = 0; at < sizes[i]; at++)
                assert_int_equal(grants[i][at], i & 0xFF);
        arena_release(&arena);
        assert_int_equal(arena.used_bytes, 0);
    }
}

static void test_arena_keeps_to_its_limit(void **state)
{
    struct arena arena;

    (void)state;
    arena_init(&arena, 1000); /* 15 grants of 64 and a rest nobody can have */
    for (int i = 0; i < 15; i++)
        assert_non_null(arena_alloc(&arena, (size_t)(i * 4)));
    assert_int_equal(arena.used_bytes, 960);
    assert_null(arena_alloc(&arena, 1));
    assert_null(arena_alloc(&arena, SIZE_MAX));
    assert_null(arena_alloc(&arena, SIZE_MAX - 63));
    arena_release(&arena);
    assert_non_null(arena_alloc(&arena, 960));
    assert_null(arena_alloc(&arena, 0));
    arena_release(&arena);
    arena_init(&arena, 0);
    assert_null(arena_alloc(&arena, 0));
    arena_release(&arena);
    arena_init(&arena, SIZE_MAX);
    assert_non_null(arena_alloc(&arena, 1));
    arena_release(&arena);
}

static void test_arena_copies_text(void **state)
{
    struct arena arena;
    char *copy;

    (void)state;
    arena_init(&arena, 256);
    copy = arena_strndup(&arena, "abcdef", 3);
    assert_string_equal(copy, "abc");
    copy = arena_strndup(&arena, NULL, 0);
    assert_string_equal(copy, "");
    assert_null(arena_strndup(&arena, "x", SIZE_MAX));
    assert_null(arena_strndup(&arena, "x", 4096));
    arena_release(&arena);
}

/* random numbers */

static void test_random_is_xoshiro256_starstar(void **state)
{
    struct random random = {{1, 2, 3, 4}};

    (void)state;
    assert_true(random_u64(&random) == 11520);
    assert_true(random_u64(&random) == 0);
    assert_true(random_u64(&random) == 1509978240);
    assert_true(random_u64(&random) == UINT64_C(1215971899390074240));
}

/* Builds must not change from one release to the next because the seeding did. */
static void test_random_sequences_stay_what_they_are(void **state)
{
    struct random random;

    (void)state;
    random_init(&random, 1, 0);
    assert_true(random_u64(&random) == UINT64_C(0x6082e9993631e7d5));
    assert_true(random_u64(&random) == UINT64_C(0xe9acc0d447272233));
    random_init(&random, 1, 1);
    assert_true(random_u64(&random) == UINT64_C(0x40b293030dc336));
    assert_true(random_normal(&random) == 0x1.649a480000000p+0f);
}

static void test_random_streams_share_no_state(void **state)
{
    enum { STREAMS = 200 };
    static uint64_t words[4 * STREAMS];

    (void)state;
    for (uint64_t stream = 0; stream < STREAMS; stream++) {
        struct random random;

        random_init(&random, 42, stream);
        memcpy(words + 4 * stream, random.state, sizeof random.state);
    }
    for (int i = 0; i < 4 * STREAMS; i++)
        for (int j = 0; j < i; j++)
            assert_true(words[i] != words[j]);
}

static void test_random_below_is_even_and_within_bounds(void **state)
{
    static const uint64_t bounds[] = {1, 2, 3, 7, 1000, UINT64_C(3) << 62, UINT64_MAX};
    struct random random;
    uint32_t seen[7] = {0};
    uint32_t low = 0;

    (void)state;
    random_init(&random, 4, 0);
    for (size_t b = 0; b < sizeof bounds / sizeof bounds[0]; b++)
        for (int i = 0; i < 1000; i++)
            assert_true(random_below(&random, bounds[b]) < bounds[b]);
    for (int i = 0; i < 70000; i++)
        seen[random_below(&random, 7)]++;
    for (int i = 0; i < 7; i++)
        assert_in_range(seen[i], 9500, 10500);
    /* A modulo would put half of the draws into the lowest third here. */
    for (int i = 0; i < 30000; i++)
        low += random_below(&random, UINT64_C(3) << 62) < UINT64_C(1) << 62;
    assert_in_range(low, 9500, 10500);
}

static void test_random_floats_and_normals_have_their_moments(void **state)
{
    enum { DRAWS = 200000 };
    struct random random;
    double sum = 0, squares = 0, fourths = 0;

    (void)state;
    random_init(&random, 5, 0);
    for (int i = 0; i < DRAWS; i++) {
        float f = random_float(&random);

        assert_true(f >= 0.0f && f < 1.0f);
        sum += f;
    }
    assert_true(fabs(sum / DRAWS - 0.5) < 0.005);
    sum = 0;
    for (int i = 0; i < DRAWS; i++) {
        double f = random_normal(&random);

        sum += f;
        squares += f * f;
        fourths += f * f * f * f;
    }
    assert_true(fabs(sum / DRAWS) < 0.01);
    assert_true(fabs(squares / DRAWS - 1.0) < 0.02);
    assert_true(fabs(fourths / DRAWS - 2.9) < 0.1); /* 3 less 1.2 / 12 */
}

static void test_random_permutation_holds_every_number_once(void **state)
{
    enum { COUNT = 1000 };
    uint32_t order[COUNT], again[COUNT];
    uint8_t seen[COUNT] = {0};
    struct random random;
    uint32_t in_place = 0, first[3] = {0};

    (void)state;
    random_init(&random, 6, 0);
    random_permutation(&random, order, COUNT);
    for (int i = 0; i < COUNT; i++) {
        assert_true(order[i] < COUNT && !seen[order[i]]);
        seen[order[i]] = 1;
        in_place += order[i] == (uint32_t)i;
    }
    assert_true(in_place < 10);
    random_init(&random, 6, 0);
    random_permutation(&random, again, COUNT);
    assert_memory_equal(order, again, sizeof order);
    for (int i = 0; i < 30000; i++) {
        random_permutation(&random, order, 3);
        first[order[0]]++;
    }
    for (int i = 0; i < 3; i++)
        assert_in_range(first[i], 9500, 10500);
    random_permutation(&random, order, 0);
}

/* threads */

struct loop {
    uint32_t *visits; /* plain: ranges must not overlap */
    uint64_t count;
    uint64_t grain;
    uint32_t workers;
    _Atomic uint32_t inside[64]; /* by worker */
    _Atomic uint64_t calls;
};

static void visit(void *context, uint64_t begin, uint64_t end, uint32_t worker)
{
    struct loop *loop = context;

    if (worker >= loop->workers || atomic_fetch_add(&loop->inside[worker], 1) != 0 ||
        begin % loop->grain != 0 || begin >= end || end > loop->count ||
        (end - begin != loop->grain && end != loop->count))
        abort();
    for (uint64_t i = begin; i < end; i++)
        loop->visits[i]++;
    atomic_fetch_add(&loop->calls, 1);
    atomic_fetch_sub(&loop->inside[worker], 1);
}

static void test_pool_visits_every_item_once(void **state)
{
    static const uint32_t worker_counts[] = {1, 2, 4, 9};
    static const uint64_t counts[] = {0, 1, 2, 63, 64, 65, 5000};
    static const uint64_t grains[] = {1, 7, 64, 100000, UINT64_MAX};
    static uint32_t visits[5000];

    (void)state;
    for (int w = -1; w < 4; w++) {
        struct pool *pool = NULL;
        struct error err = ERROR_INIT;

        if (w >= 0)
            assert_int_equal(pool_new(worker_counts[w], &pool, &err), 0);
        if (w >= 0)
            assert_int_equal(pool_workers(pool), worker_counts[w]);
        for (size_t c = 0; c < sizeof counts / sizeof counts[0]; c++)
            for (size_t g = 0; g < sizeof grains / sizeof grains[0]; g++) {
                struct loop loop = {.visits = visits,
                                    .count = counts[c],
                                    .grain = grains[g],
                                    .workers = w < 0 ? 1 : worker_counts[w]};

                memset(visits, 0, sizeof visits);
                pool_for(pool, counts[c], grains[g], visit, &loop);
                for (uint64_t i = 0; i < counts[c]; i++)
                    assert_int_equal(visits[i], 1);
                assert_true(atomic_load(&loop.calls) ==
                            counts[c] / grains[g] + (counts[c] % grains[g] != 0));
            }
        pool_free(pool);
    }
}

static void test_pool_runs_many_small_loops(void **state)
{
    static uint32_t visits[16];
    struct pool *pool;
    struct loop loop = {.visits = visits, .count = 16, .grain = 1, .workers = 4};

    (void)state;
    memset(visits, 0, sizeof visits);
    assert_int_equal(pool_new(4, &pool, NULL), 0);
    for (int i = 0; i < 3000; i++)
        pool_for(pool, 16, 1, visit, &loop);
    for (int i = 0; i < 16; i++)
        assert_int_equal(visits[i], 3000);
    pool_free(pool);
    pool_free(NULL);
}

static void note_worker(void *context, uint64_t begin, uint64_t end, uint32_t worker)
{
    _Atomic uint64_t *seen = context;
    struct timespec nap = {.tv_nsec = 20 * 1000 * 1000};

    (void)begin;
    (void)end;
    atomic_fetch_or(seen, UINT64_C(1) << worker);
    nanosleep(&nap, NULL);
}

static void test_pool_puts_all_its_workers_to_work(void **state)
{
    struct pool *pool;
    _Atomic uint64_t seen = 0;

    (void)state;
    assert_int_equal(pool_new(3, &pool, NULL), 0);
    for (int tries = 0; tries < 20 && atomic_load(&seen) != 7; tries++)
        pool_for(pool, 12, 1, note_worker, &seen);
    assert_int_equal(atomic_load(&seen), 7);
    pool_free(pool);
}

static void test_pool_defaults_to_one_worker_per_cpu(void **state)
{
    struct pool *pool;

    (void)state;
    assert_true(cpu_count() >= 1);
    assert_int_equal(pool_new(0, &pool, NULL), 0);
    assert_int_equal(pool_workers(pool), cpu_count());
    pool_free(pool);
}

/* jobs */

struct reports {
    struct job_progress last;
    uint32_t count;
    uint32_t ends;
    _Atomic bool inside;
    bool overlapped;
    uint64_t done_at_end;
};

static void note_report(void *context, const struct job_progress *progress)
{
    struct reports *reports = context;

    if (atomic_exchange(&reports->inside, true))
        reports->overlapped = true;
    reports->count++;
    reports->last = *progress;
    if (progress->phase_end) {
        reports->ends++;
        reports->done_at_end = progress->done;
    }
    atomic_store(&reports->inside, false);
}

static void nap_ms(long ms)
{
    struct timespec nap = {.tv_sec = ms / 1000, .tv_nsec = ms % 1000 * 1000 * 1000};

    nanosleep(&nap, NULL);
}

static void test_job_reports_each_phase(void **state)
{
    struct reports reports = {0};
    struct job *job = job_new(note_report, &reports);

    (void)state;
    assert_non_null(job);
    assert_int_equal(job_advance(job, 5, NULL), 0); /* before the first phase: nothing to tell */
    assert_int_equal(reports.count, 0);
    job_phase(job, "read", 100);
    assert_int_equal(reports.count, 1);
    assert_string_equal(reports.last.phase, "read");
    assert_int_equal(reports.last.phase_number, 1);
    assert_true(reports.last.done == 0 && reports.last.total == 100);
    assert_true(reports.last.eta_seconds < 0 && !reports.last.phase_end);
    assert_int_equal(job_advance(job, 25, NULL), 0);
    nap_ms(120);
    assert_int_equal(job_advance(job, 25, NULL), 0);
    assert_int_equal(reports.count, 2);
    assert_true(reports.last.done == 50 && !reports.last.phase_end);
    assert_true(reports.last.rate > 0 && reports.last.rate < 50 / 0.12);
    assert_true(reports.last.eta_seconds > 0.1 && reports.last.elapsed_seconds > 0.1);
    job_phase(job, "write", 0);
    assert_int_equal(reports.count, 4); /* the end of one, the start of the next */
    assert_int_equal(reports.ends, 1);
    assert_true(reports.done_at_end == 50);
    assert_int_equal(reports.last.phase_number, 2);
    assert_true(reports.last.done == 0 && reports.last.total == 0);
    job_finish(job);
    assert_int_equal(reports.ends, 2);
    assert_true(reports.last.phase_end);
    job_finish(job);
    assert_int_equal(reports.ends, 2);
    job_free(job);
}

static void test_job_plan_forecasts_the_whole_from_what_was_measured(void **state)
{
    static const struct job_plan_phase phases[] = {{"one", 1}, {"two", 5}, {"one", 3}, {"end", 1}};
    struct reports reports = {0};
    struct job *job = job_new(note_report, &reports);

    (void)state;
    job_phase(job, "before", 0);
    assert_int_equal(reports.last.phases, 0);
    assert_true(reports.last.eta_total_seconds < 0);
    job_plan(job, phases, 4);
    job_phase(job, "one", 10);
    assert_int_equal(reports.last.phases, 4);
    assert_int_equal(reports.last.phase_number, 1);
    assert_true(reports.last.eta_total_seconds < 0); /* nothing is measured yet */
    nap_ms(60);
    job_advance(job, 10, NULL);
    job_phase(job, "two", 10);
    assert_int_equal(reports.last.phase_number, 2);
    /* Nine units of weight at 60 ms or more each; a loaded machine may take longer. */
    assert_true(reports.last.eta_total_seconds > 0.5);
    job_phase(job, "not planned", 1); /* counts to the one before */
    assert_int_equal(reports.last.phase_number, 2);
    assert_true(reports.last.eta_total_seconds >= 0);
    job_phase(job, "end", 1); /* the second "one" is taken for done */
    assert_int_equal(reports.last.phase_number, 4);
    job_plan(job, phases, 2);
    job_phase(job, "two", 0);
    assert_int_equal(reports.last.phases, 2);
    assert_int_equal(reports.last.phase_number, 2);
    assert_true(reports.last.eta_total_seconds < 0);
    job_plan(NULL, phases, 4);
    job_free(job);
}

static void test_job_reports_at_most_every_100_ms(void **state)
{
    struct reports reports = {0};
    struct job *job = job_new(note_report, &reports);
    struct timespec begin, now;
    double seconds;

    (void)state;
    assert_non_null(job);
    clock_gettime(CLOCK_MONOTONIC, &begin);
    job_phase(job, "spin", 0);
    do {
        assert_int_equal(job_advance(job, 1, NULL), 0);
        clock_gettime(CLOCK_MONOTONIC, &now);
        seconds =
            (double)(now.tv_sec - begin.tv_sec) + (double)(now.tv_nsec - begin.tv_nsec) * 1e-9;
    } while (seconds < 0.35);
    assert_in_range(reports.count, 2, 1 + (uint32_t)(seconds * 10));
    job_free(job);
}

static void advance_range(void *context, uint64_t begin, uint64_t end, uint32_t worker)
{
    (void)worker;
    for (uint64_t i = begin; i < end; i++) {
        nap_ms(1);
        job_advance(context, 1, NULL);
    }
}

static void test_job_counts_over_threads_and_never_overlaps_reports(void **state)
{
    struct reports reports = {0};
    struct job *job = job_new(note_report, &reports);
    struct pool *pool;

    (void)state;
    assert_non_null(job);
    assert_int_equal(pool_new(4, &pool, NULL), 0);
    for (int phase = 0; phase < 2; phase++) {
        job_phase(job, "count", 800);
        pool_for(pool, 800, 10, advance_range, job);
    }
    job_finish(job);
    assert_true(reports.done_at_end == 800);
    assert_true(reports.last.eta_seconds == 0);
    assert_false(reports.overlapped);
    assert_true(reports.count >= 4);
    pool_free(pool);
    job_free(job);
}

static struct job *signalled_job;

static void cancel_on_signal(int number)
{
    (void)number;
    job_cancel(signalled_job);
}

static void test_job_cancels_from_a_signal_handler(void **state)
{
    struct error err = ERROR_INIT;
    struct job *job = job_new(NULL, NULL);
    void (*old)(int);

    (void)state;
    assert_non_null(job);
    job_phase(job, "wait", 1);
    assert_int_equal(job_advance(job, 1, &err), 0);
    assert_false(job_cancelled(job));
    signalled_job = job;
    old = signal(SIGUSR1, cancel_on_signal);
    raise(SIGUSR1);
    signal(SIGUSR1, old);
    assert_true(job_cancelled(job));
    assert_int_equal(job_advance(job, 1, &err), -1);
    assert_int_equal(err.code, ERR_CANCELLED);
    assert_int_equal(job_advance(job, 1, NULL), -1);
    job_finish(job);
    job_free(job);
}

static void *cancel_later(void *job)
{
    nap_ms(20);
    job_cancel(job);
    return NULL;
}

static void test_job_cancels_from_another_thread(void **state)
{
    struct error err = ERROR_INIT;
    struct job *job = job_new(NULL, NULL);
    pthread_t thread;

    (void)state;
    assert_non_null(job);
    job_phase(job, "spin", 0);
    assert_int_equal(pthread_create(&thread, NULL, cancel_later, job), 0);
    while (job_advance(job, 1, &err) == 0)
        ;
    assert_int_equal(err.code, ERR_CANCELLED);
    pthread_join(thread, NULL);
    job_free(job);
}

static void test_a_null_job_never_stops_anything(void **state)
{
    (void)state;
    job_phase(NULL, "x", 1);
    assert_int_equal(job_advance(NULL, 1, NULL), 0);
    assert_false(job_cancelled(NULL));
    job_cancel(NULL);
    job_finish(NULL);
    job_free(NULL);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_the_first_error_wins),
        cmocka_unit_test(test_a_null_error_is_accepted),
        cmocka_unit_test(test_errno_becomes_the_right_code),
        cmocka_unit_test(test_prefix_and_remedy_frame_the_message),
        cmocka_unit_test(test_a_long_message_is_cut_between_characters),
        cmocka_unit_test(test_every_code_has_a_name),
        cmocka_unit_test(test_loads_and_stores_are_little_endian),
        cmocka_unit_test(test_size_arithmetic_reports_overflow),
        cmocka_unit_test(test_crc32c_matches_the_known_answers),
        cmocka_unit_test(test_fast_crc32c_agrees_with_the_portable_one),
        cmocka_unit_test(test_fast_crc32c_agrees_for_all_lengths_up_to_a_page_wherever_they_start),
        cmocka_unit_test(test_crc32c_of_pieces_is_that_of_the_whole),
        cmocka_unit_test(test_crc32c_combine_takes_huge_lengths),
        cmocka_unit_test(test_sha256_matches_the_known_answers),
        cmocka_unit_test(test_key_hash_is_xxh3_with_seed_0),
        cmocka_unit_test(test_arena_grants_are_aligned_zeroed_and_apart),
        cmocka_unit_test(test_arena_keeps_to_its_limit),
        cmocka_unit_test(test_arena_copies_text),
        cmocka_unit_test(test_random_is_xoshiro256_starstar),
        cmocka_unit_test(test_random_sequences_stay_what_they_are),
        cmocka_unit_test(test_random_streams_share_no_state),
        cmocka_unit_test(test_random_below_is_even_and_within_bounds),
        cmocka_unit_test(test_random_floats_and_normals_have_their_moments),
        cmocka_unit_test(test_random_permutation_holds_every_number_once),
        cmocka_unit_test(test_pool_visits_every_item_once),
        cmocka_unit_test(test_pool_runs_many_small_loops),
        cmocka_unit_test(test_pool_puts_all_its_workers_to_work),
        cmocka_unit_test(test_pool_defaults_to_one_worker_per_cpu),
        cmocka_unit_test(test_job_reports_each_phase),
        cmocka_unit_test(test_job_plan_forecasts_the_whole_from_what_was_measured),
        cmocka_unit_test(test_job_reports_at_most_every_100_ms),
        cmocka_unit_test(test_job_counts_over_threads_and_never_overlaps_reports),
        cmocka_unit_test(test_job_cancels_from_a_signal_handler),
        cmocka_unit_test(test_job_cancels_from_another_thread),
        cmocka_unit_test(test_a_null_job_never_stops_anything),
    };

    return cmocka_run_group_tests_name("base", tests, NULL, NULL);
}
