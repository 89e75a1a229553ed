/* Checks storage/catalogue.c and storage/data_directory.c: the answers are MANIFEST's whatever
 * happens to the catalogue, one process owns the folder, numbers are never used twice, junk is left
 * alone, and no failing call makes MANIFEST and memory differ unnoticed. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "storage/base/bytes.h"
#include "storage/catalogue.h"
#include "storage/data_directory.h"
#include "storage/file.h"
#include "storage/manifest.h"
#include "tests/support/vfs_fault.h"

static char folder[256];

/* Thousands of opens, each with its syncs: in memory they take seconds. */
static int make_folder(void **state)
{
    (void)state;
    snprintf(folder, sizeof folder, "/dev/shm/annd-catalogue-XXXXXX");
    if (mkdtemp(folder))
        return 0;
    snprintf(folder, sizeof folder, "/var/tmp/annd-catalogue-XXXXXX");
    return mkdtemp(folder) ? 0 : -1;
}

static int remove_folder(void **state)
{
    (void)state;
    return file_remove_all(vfs_posix(), folder, NULL);
}

/* "<folder>/<data directory>" or a file in it. */
static const char *path_in(const char *name, const char *file)
{
    static char paths[4][600];
    static unsigned turn;
    char *path = paths[turn++ % 4];

    snprintf(path, 600, "%s/%s%s%s", folder, name, file ? "/" : "", file ? file : "");
    return path;
}

static struct data_directory *must_open(const char *name)
{
    struct data_directory *dd = NULL;
    struct error err = ERROR_INIT;

    if (data_directory_open(vfs_posix(), path_in(name, NULL), true, &dd, &err) < 0)
        fail_msg("%s", err.message);
    return dd;
}

static enum error_code open_code(const char *name, bool create)
{
    struct data_directory *dd = NULL;
    struct error err = ERROR_INIT;

    data_directory_open(vfs_posix(), path_in(name, NULL), create, &dd, &err);
    assert_int_equal(dd != NULL, err.code == ERR_NONE);
    data_directory_close(dd);
    return err.code;
}

static bool warned_of(const struct data_directory *dd, const char *text)
{
    for (uint32_t i = 0; i < data_directory_warning_count(dd); i++) {
        if (strstr(data_directory_warning(dd, i), text))
            return true;
    }
    return false;
}

static void no_warnings(const struct data_directory *dd)
{
    if (data_directory_warning_count(dd) > 0)
        fail_msg("%s", data_directory_warning(dd, 0));
}

static int add(struct data_directory *dd, const char *database, const char *name,
               const char *const *aliases, uint32_t alias_count, uint64_t *number,
               struct error *err)
{
    struct data_collection collection = {.name = name,
                                         .database = database,
                                         .description = "what it is",
                                         .aliases = aliases,
                                         .alias_count = alias_count,
                                         .load = true,
                                         .created_ms = 1700000000000u};
    char path[FILE_PATH_MAX];

    collection.number = data_directory_new_number(dd);
    *number = collection.number;
    if (data_directory_collection_path(dd, collection.number, path, err) < 0 ||
        file_mkdir(vfs_posix(), path, err) < 0)
        return -1;
    return data_directory_add(dd, &collection, err);
}

static uint64_t must_add(struct data_directory *dd, const char *database, const char *name,
                         const char *alias_a, const char *alias_b)
{
    const char *aliases[2] = {alias_a, alias_b};
    struct error err = ERROR_INIT;
    uint64_t number;

    if (add(dd, database, name, aliases, (alias_a != NULL) + (alias_b != NULL), &number, &err) < 0)
        fail_msg("%s", err.message);
    return number;
}

static uint64_t number_of(struct data_directory *dd, const char *database, const char *name)
{
    const struct data_collection *collection = data_directory_find(dd, database, name);

    return collection ? collection->number : 0;
}

/* The sample every damage test starts from and expects back. */
static void make_sample(const char *name)
{
    struct data_directory *dd = must_open(name);

    assert_int_equal(must_add(dd, NULL, "books", "b", "latest"), 1);
    assert_int_equal(must_add(dd, "", "films", NULL, NULL), 2);
    assert_int_equal(must_add(dd, "other", "books", "films", NULL), 3);
    no_warnings(dd);
    data_directory_close(dd);
}

static void check_sample(struct data_directory *dd)
{
    assert_int_equal(data_directory_count(dd), 3);
    assert_int_equal(number_of(dd, NULL, "books"), 1);
    assert_int_equal(number_of(dd, "default", "b"), 1);
    assert_int_equal(number_of(dd, "", "latest"), 1);
    assert_int_equal(number_of(dd, NULL, "films"), 2);
    assert_int_equal(number_of(dd, "other", "books"), 3);
    assert_int_equal(number_of(dd, "other", "films"), 3);
    assert_int_equal(number_of(dd, "other", "b"), 0);
    assert_int_equal(number_of(dd, "third", "books"), 0);
    assert_int_equal(number_of(dd, NULL, ""), 0);
    assert_int_equal(number_of(dd, NULL, "book"), 0);
}

static void test_collections_are_there_after_a_restart(void **state)
{
    const struct data_collection *collection;
    struct data_directory *dd;
    struct catalogue_stats stats;
    uint8_t uuid[CATALOGUE_UUID_BYTES];

    (void)state;
    make_sample("restart");
    dd = must_open("restart");
    no_warnings(dd); /* the catalogue was taken over */
    check_sample(dd);
    collection = data_directory_at(dd, 0);
    assert_string_equal(collection->name, "books");
    assert_string_equal(collection->database, "default");
    assert_string_equal(collection->description, "what it is");
    assert_int_equal(collection->alias_count, 2);
    assert_string_equal(collection->aliases[1], "latest");
    assert_true(collection->load);
    assert_int_equal(collection->created_ms, 1700000000000u);
    assert_null(data_directory_at(dd, 3));
    assert_ptr_equal(data_directory_get(dd, 2), data_directory_at(dd, 1));
    assert_null(data_directory_get(dd, 4));
    assert_int_equal(data_directory_catalogue_stats(dd, &stats, NULL), 0);
    assert_int_equal(stats.name_count, 3);
    assert_int_equal(stats.alias_count, 3);
    assert_int_equal(data_directory_generation(dd), 4);
    memcpy(uuid, data_directory_uuid(dd), sizeof uuid);
    data_directory_close(dd);
    dd = must_open("restart");
    assert_memory_equal(uuid, data_directory_uuid(dd), sizeof uuid);
    data_directory_close(dd);
}

static void test_names_change_and_go(void **state)
{
    struct data_collection changed;
    struct data_directory *dd;
    struct error err = ERROR_INIT;
    const char *aliases[] = {"fresh", "b"};

    (void)state;
    make_sample("change");
    dd = must_open("change");
    changed = *data_directory_get(dd, 1);
    changed.name = "volumes";
    changed.aliases = aliases;
    changed.alias_count = 2;
    changed.load = false;
    if (data_directory_update(dd, &changed, &err) < 0)
        fail_msg("%s", err.message);
    assert_int_equal(data_directory_remove(dd, 2, NULL), 0);
    for (int i = 0; i < 2; i++) {
        no_warnings(dd);
        assert_int_equal(number_of(dd, NULL, "volumes"), 1);
        assert_int_equal(number_of(dd, NULL, "fresh"), 1);
        assert_int_equal(number_of(dd, NULL, "b"), 1);
        assert_int_equal(number_of(dd, NULL, "books"), 0);
        assert_int_equal(number_of(dd, NULL, "latest"), 0);
        assert_int_equal(number_of(dd, NULL, "films"), 0);
        assert_false(data_directory_get(dd, 1)->load);
        assert_string_equal(data_directory_get(dd, 1)->description, "what it is");
        assert_int_equal(data_directory_count(dd), 2);
        assert_int_equal(file_remove_all(vfs_posix(), path_in("change", "collections/2"), NULL), 0);
        data_directory_close(dd);
        dd = must_open("change");
    }
    assert_int_equal(data_directory_remove(dd, 2, &err), -1);
    assert_int_equal(err.code, ERR_NOT_FOUND);
    error_clear(&err);
    changed.number = 2;
    assert_int_equal(data_directory_update(dd, &changed, &err), -1);
    assert_int_equal(err.code, ERR_NOT_FOUND);
    /* A number that was used is not used again. */
    assert_int_equal(data_directory_new_number(dd), 4);
    data_directory_close(dd);
}

static void test_taken_and_impossible_names_are_refused(void **state)
{
    static const struct {
        const char *database, *name, *alias, *alias_b;
        enum error_code code;
    } cases[] = {
        {NULL, "books", NULL, NULL, ERR_EXISTS},  {NULL, "latest", NULL, NULL, ERR_EXISTS},
        {NULL, "new", "films", NULL, ERR_EXISTS}, {NULL, "new", "b", NULL, ERR_EXISTS},
        {NULL, "new", "new", NULL, ERR_EXISTS},   {NULL, "new", "x", "x", ERR_INVALID},
        {NULL, "", NULL, NULL, ERR_INVALID},      {NULL, "a\nb", NULL, NULL, ERR_INVALID},
        {NULL, "new", "", NULL, ERR_INVALID},     {"data\x7f", "new", NULL, NULL, ERR_INVALID},
    };
    struct data_directory *dd;
    char longest[DATA_NAME_MAX + 2];
    struct data_collection collection = {.name = "new"};
    struct error err = ERROR_INIT;
    uint64_t generation, number;

    (void)state;
    make_sample("refuse");
    dd = must_open("refuse");
    generation = data_directory_generation(dd);
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        const char *aliases[2] = {cases[i].alias, cases[i].alias_b};
        uint32_t alias_count = (cases[i].alias != NULL) + (cases[i].alias_b != NULL);

        error_clear(&err);
        assert_int_equal(
            add(dd, cases[i].database, cases[i].name, aliases, alias_count, &number, &err), -1);
        if (err.code != cases[i].code)
            fail_msg("case %zu: %s %s", i, error_code_name(err.code), err.message);
    }
    memset(longest, 'n', sizeof longest);
    longest[DATA_NAME_MAX + 1] = 0;
    error_clear(&err);
    assert_int_equal(add(dd, NULL, longest, NULL, 0, &number, &err), -1);
    assert_int_equal(err.code, ERR_INVALID);
    /* Numbers nobody got, and a folder that is not there. */
    collection.number = 1000;
    error_clear(&err);
    assert_int_equal(data_directory_add(dd, &collection, &err), -1);
    assert_int_equal(err.code, ERR_INVALID);
    collection.number = 1;
    error_clear(&err);
    assert_int_equal(data_directory_add(dd, &collection, &err), -1);
    assert_int_equal(err.code, ERR_EXISTS);
    collection.number = data_directory_new_number(dd);
    error_clear(&err);
    assert_int_equal(data_directory_add(dd, &collection, &err), -1);
    assert_int_equal(err.code, ERR_NOT_FOUND);
    assert_int_equal(data_directory_generation(dd), generation);
    check_sample(dd);
    /* The longest names there may be are found again. */
    longest[DATA_NAME_MAX] = 0;
    number = must_add(dd, longest, longest, NULL, NULL);
    assert_int_equal(number_of(dd, longest, longest), number);
    no_warnings(dd);
    data_directory_close(dd);
}

static void test_a_folder_is_made_only_when_asked_and_free(void **state)
{
    struct data_directory *dd;

    (void)state;
    assert_int_equal(open_code("fresh", false), ERR_NOT_FOUND);
    assert_false(file_exists(vfs_posix(), path_in("fresh", NULL)));
    assert_int_equal(file_mkdir(vfs_posix(), path_in("fresh", NULL), NULL), 0);
    assert_int_equal(open_code("fresh", false), ERR_NOT_FOUND);
    assert_false(file_exists(vfs_posix(), path_in("fresh", "LOCK")));
    assert_int_equal(open_code("fresh", true), ERR_NONE);
    assert_int_equal(open_code("fresh", false), ERR_NONE);
    /* What a start that died early leaves. */
    assert_int_equal(file_mkdir(vfs_posix(), path_in("half", NULL), NULL), 0);
    assert_int_equal(file_publish(vfs_posix(), path_in("half", "LOCK"), "", 0, NULL), 0);
    assert_int_equal(file_publish(vfs_posix(), path_in("half", "MANIFEST.tmp"), "A", 1, NULL), 0);
    assert_int_equal(file_mkdir(vfs_posix(), path_in("half", "collections"), NULL), 0);
    dd = must_open("half");
    no_warnings(dd);
    data_directory_close(dd);
    /* Somebody's home. */
    assert_int_equal(file_mkdir(vfs_posix(), path_in("home", NULL), NULL), 0);
    assert_int_equal(file_publish(vfs_posix(), path_in("home", "letter"), "Dear", 4, NULL), 0);
    assert_int_equal(open_code("home", true), ERR_EXISTS);
    assert_false(file_exists(vfs_posix(), path_in("home", "LOCK")));
    assert_int_equal(open_code("home/letter", true), ERR_INVALID);
    /* A data directory whose MANIFEST is lost is not begun anew over its collections. */
    assert_int_equal(file_mkdir(vfs_posix(), path_in("fresh", "collections/1"), NULL), 0);
    assert_int_equal(file_remove_all(vfs_posix(), path_in("fresh", "MANIFEST"), NULL), 0);
    assert_int_equal(open_code("fresh", true), ERR_CORRUPT);
    assert_true(file_exists(vfs_posix(), path_in("fresh", "collections/1")));
}

static void test_a_second_owner_is_refused(void **state)
{
    struct data_directory *dd;
    struct data_directory *second = NULL;
    struct error err = ERROR_INIT;
    int status = 0;
    pid_t child;

    (void)state;
    make_sample("locked");
    dd = must_open("locked");
    child = fork();
    if (child == 0) {
        int rc = data_directory_open(vfs_posix(), path_in("locked", NULL), true, &second, &err);

        _exit(rc == -1 && err.code == ERR_BUSY && strstr(err.message, "another annd process") ? 0
                                                                                              : 1);
    }
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_true(WIFEXITED(status));
    assert_int_equal(WEXITSTATUS(status), 0);
    assert_int_equal(open_code("locked", true), ERR_BUSY);
    check_sample(dd); /* the refused one disturbed nothing */
    data_directory_close(dd);
    dd = must_open("locked");
    no_warnings(dd);
    data_directory_close(dd);
}

/* A child that opens, adds and dies without closing. */
static void test_a_killed_owner_leaves_lock_and_truth_in_order(void **state)
{
    struct data_directory *dd;
    int status = 0;
    pid_t child;

    (void)state;
    make_sample("killed");
    child = fork();
    if (child == 0) {
        dd = must_open("killed");
        must_add(dd, NULL, "maps", "m", NULL);
        kill(getpid(), 9);
    }
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_true(WIFSIGNALED(status));
    dd = must_open("killed");
    assert_true(warned_of(dd, "not closed cleanly"));
    assert_int_equal(data_directory_warning_count(dd), 1);
    assert_int_equal(number_of(dd, NULL, "m"), 4);
    assert_int_equal(number_of(dd, NULL, "books"), 1);
    data_directory_close(dd);
}

static void test_junk_and_leftovers_are_told_apart(void **state)
{
    static const char *const kept[] = {"collections/notes.txt",
                                       "collections/007",
                                       "collections/2.tmp",
                                       "collections/5",
                                       "collections/6.bak",
                                       "collections/-1.tmp",
                                       "collections/99999999999999999999.tmp",
                                       "unknown",
                                       "MANIFEST.bak"};
    struct data_directory *dd;

    (void)state;
    make_sample("junk");
    for (size_t i = 0; i < sizeof kept / sizeof kept[0]; i++)
        assert_int_equal(file_mkdir(vfs_posix(), path_in("junk", kept[i]), NULL), 0);
    assert_int_equal(file_mkdir(vfs_posix(), path_in("junk", "collections/8.tmp"), NULL), 0);
    assert_int_equal(
        file_publish(vfs_posix(), path_in("junk", "collections/8.tmp/f.pages"), "x", 1, NULL), 0);
    assert_int_equal(file_remove_all(vfs_posix(), path_in("junk", "collections/3"), NULL), 0);
    dd = must_open("junk");
    check_sample(dd);
    for (size_t i = 0; i < sizeof kept / sizeof kept[0]; i++) {
        assert_true(file_exists(vfs_posix(), path_in("junk", kept[i])));
        if (i < 7 && !warned_of(dd, kept[i]))
            fail_msg("no warning of %s", kept[i]);
    }
    assert_false(file_exists(vfs_posix(), path_in("junk", "collections/8.tmp")));
    assert_true(warned_of(dd, "collections/8.tmp: left over from an unfinished attach, removed"));
    assert_true(warned_of(dd, "the folder of collection books is missing"));
    /* Above everything seen. */
    assert_int_equal(data_directory_new_number(dd), 9);
    assert_int_equal(data_directory_new_number(dd), 10);
    assert_int_equal(must_add(dd, NULL, "maps", NULL, NULL), 11);
    data_directory_close(dd);
    dd = must_open("junk");
    assert_int_equal(data_directory_new_number(dd), 12);
    data_directory_close(dd);
}

static void damage(const char *name, const char *file, uint64_t offset, uint8_t mask)
{
    const char *path = path_in(name, file);
    struct vfs_file *f = file_open(vfs_posix(), path, VFS_WRITE, NULL);
    uint8_t byte;

    assert_non_null(f);
    assert_int_equal(file_read_exact(f, path, &byte, 1, offset, NULL), 0);
    byte ^= mask;
    assert_int_equal(file_write_full(f, path, &byte, 1, offset, NULL), 0);
    assert_int_equal(file_close(f, path, NULL), 0);
}

static void test_a_missing_catalogue_changes_no_answer(void **state)
{
    static const char *const lost[] = {"catalogue", "catalogue/SEAL", "catalogue/data.mdb"};
    struct data_directory *dd;

    (void)state;
    make_sample("lost");
    for (int i = 0; i < 3; i++) {
        struct catalogue_stats stats;

        assert_int_equal(file_remove_all(vfs_posix(), path_in("lost", lost[i]), NULL), 0);
        dd = must_open("lost");
        check_sample(dd);
        assert_int_equal(data_directory_catalogue_stats(dd, &stats, NULL), 0);
        assert_int_equal(stats.name_count, 3);
        assert_int_equal(warned_of(dd, "rebuilt from MANIFEST"), i == 1);
        data_directory_close(dd);
        dd = must_open("lost");
        no_warnings(dd);
        data_directory_close(dd);
    }
}

/* Every byte of the first page, the seal, and a stride through the rest. */
static void test_a_damaged_catalogue_changes_no_answer(void **state)
{
    struct data_directory *dd;
    struct vfs_stat st;

    (void)state;
    make_sample("damaged");
    assert_int_equal(file_stat(vfs_posix(), path_in("damaged", "catalogue/data.mdb"), &st, NULL),
                     0);
    assert_true(st.bytes > 4096);
    for (uint64_t at = 0; at < st.bytes; at += at < 4096 ? 1 : 61) {
        /* Rebuilding took less room than growing did. */
        assert_int_equal(
            file_stat(vfs_posix(), path_in("damaged", "catalogue/data.mdb"), &st, NULL), 0);
        if (at >= st.bytes)
            break;
        damage("damaged", "catalogue/data.mdb", at, (uint8_t)(1u << at % 8));
        dd = must_open("damaged");
        if (!warned_of(dd, "data.mdb is not the file that was sealed"))
            fail_msg("byte %lu flipped is not found", (unsigned long)at);
        check_sample(dd);
        data_directory_close(dd);
    }
    for (uint64_t at = 0; at < 128; at++) {
        damage("damaged", "catalogue/SEAL", at, (uint8_t)(1u << at % 8));
        dd = must_open("damaged");
        assert_true(warned_of(dd, "rebuilt from MANIFEST"));
        check_sample(dd);
        data_directory_close(dd);
    }
    dd = must_open("damaged");
    no_warnings(dd);
    data_directory_close(dd);
}

static void copy_file(const char *from, const char *to)
{
    uint8_t *data;
    size_t bytes;
    struct error err = ERROR_INIT;

    if (file_read_whole(vfs_posix(), from, 1u << 24, &data, &bytes, &err) < 0 ||
        file_publish(vfs_posix(), to, data, bytes, &err) < 0)
        fail_msg("%s", err.message);
    free(data);
}

static void test_a_sealed_catalogue_of_another_time_or_place_is_not_taken(void **state)
{
    static const char *const files[] = {"catalogue/data.mdb", "catalogue/SEAL"};
    struct data_directory *dd;

    (void)state;
    make_sample("mine");
    /* Same generation, other data directory. */
    dd = must_open("theirs");
    must_add(dd, NULL, "x", NULL, NULL);
    must_add(dd, NULL, "y", NULL, NULL);
    must_add(dd, NULL, "books", NULL, NULL);
    data_directory_close(dd);
    for (int i = 0; i < 2; i++)
        copy_file(path_in("theirs", files[i]), path_in("mine", files[i]));
    dd = must_open("mine");
    assert_true(warned_of(dd, "the seal belongs to another MANIFEST"));
    check_sample(dd);
    data_directory_close(dd);
    /* Same data directory, from before a change. */
    for (int i = 0; i < 2; i++)
        copy_file(path_in("mine", files[i]), path_in("theirs", i ? "old-seal" : "old-data"));
    dd = must_open("mine");
    assert_int_equal(data_directory_remove(dd, 2, NULL), 0);
    data_directory_close(dd);
    for (int i = 0; i < 2; i++)
        copy_file(path_in("theirs", i ? "old-seal" : "old-data"), path_in("mine", files[i]));
    dd = must_open("mine");
    assert_true(warned_of(dd, "the seal belongs to another MANIFEST"));
    assert_int_equal(number_of(dd, NULL, "films"), 0);
    data_directory_close(dd);
}

static void test_a_catalogue_that_cannot_be_opened_is_done_without(void **state)
{
    struct data_directory *dd;
    struct catalogue_stats stats;
    struct error err = ERROR_INIT;

    (void)state;
    make_sample("blocked");
    assert_int_equal(file_remove_all(vfs_posix(), path_in("blocked", "catalogue"), NULL), 0);
    assert_int_equal(file_publish(vfs_posix(), path_in("blocked", "catalogue"), "x", 1, NULL), 0);
    dd = must_open("blocked");
    assert_true(warned_of(dd, "not used until it is rebuilt"));
    check_sample(dd);
    assert_int_equal(must_add(dd, NULL, "maps", NULL, NULL), 4);
    assert_int_equal(number_of(dd, NULL, "maps"), 4);
    assert_int_equal(data_directory_catalogue_stats(dd, &stats, &err), -1);
    assert_int_equal(err.code, ERR_NOT_FOUND);
    assert_int_equal(data_directory_rebuild_catalogue(dd, NULL), -1);
    assert_int_equal(file_remove_all(vfs_posix(), path_in("blocked", "catalogue"), NULL), 0);
    assert_int_equal(data_directory_rebuild_catalogue(dd, NULL), 0);
    assert_int_equal(data_directory_catalogue_stats(dd, &stats, NULL), 0);
    assert_int_equal(stats.name_count, 4);
    assert_int_equal(number_of(dd, NULL, "maps"), 4);
    data_directory_close(dd);
    dd = must_open("blocked");
    no_warnings(dd);
    data_directory_close(dd);
}

static void test_a_damaged_manifest_gives_way_to_the_one_before(void **state)
{
    struct data_directory *dd;
    uint64_t generation;

    (void)state;
    make_sample("back");
    /* The last change was the third collection: only that is missing afterwards. */
    damage("back", "MANIFEST", 100, 4);
    assert_int_equal(file_mkdir(vfs_posix(), path_in("back", "collections/9.tmp"), NULL), 0);
    dd = must_open("back");
    assert_true(warned_of(dd, "went back to MANIFEST.1"));
    assert_int_equal(data_directory_count(dd), 2);
    assert_int_equal(number_of(dd, NULL, "latest"), 1);
    assert_int_equal(number_of(dd, "other", "books"), 0);
    /* Its folder is kept, its number stays taken, and nothing is cleared away in such times. */
    assert_true(file_exists(vfs_posix(), path_in("back", "collections/3")));
    assert_true(file_exists(vfs_posix(), path_in("back", "collections/9.tmp")));
    assert_true(file_exists(vfs_posix(), path_in("back", "MANIFEST.damaged")));
    assert_int_equal(data_directory_new_number(dd), 10);
    generation = data_directory_generation(dd);
    assert_int_equal(generation, 5); /* the lost one was 4 */
    must_add(dd, NULL, "maps", NULL, NULL);
    data_directory_close(dd);
    dd = must_open("back");
    assert_int_equal(number_of(dd, NULL, "maps"), 11);
    assert_int_equal(data_directory_generation(dd), 6);
    data_directory_close(dd);
    /* Gone altogether is the same. */
    assert_int_equal(file_remove_all(vfs_posix(), path_in("back", "MANIFEST"), NULL), 0);
    dd = must_open("back");
    assert_true(warned_of(dd, "went back to MANIFEST.1"));
    assert_int_equal(number_of(dd, NULL, "books"), 1);
    assert_int_equal(number_of(dd, NULL, "maps"), 0);
    data_directory_close(dd);
}

static void test_two_damaged_manifests_are_an_error_and_nothing_is_lost(void **state)
{
    (void)state;
    make_sample("both");
    damage("both", "MANIFEST", 100, 4);
    damage("both", "MANIFEST.1", 50, 4);
    assert_int_equal(open_code("both", true), ERR_CORRUPT);
    assert_true(file_exists(vfs_posix(), path_in("both", "MANIFEST")));
    damage("both", "MANIFEST", 100, 4);
    assert_int_equal(open_code("both", true), ERR_NONE);
}

static void test_a_newer_manifest_is_refused_not_replaced(void **state)
{
    uint8_t *data;
    size_t bytes;

    (void)state;
    make_sample("newer");
    assert_int_equal(
        file_read_whole(vfs_posix(), path_in("newer", "MANIFEST"), 1u << 20, &data, &bytes, NULL),
        0);
    store_u32(data + 8, 2);
    store_u32(data + 12, 0);
    store_u32(data + 12, crc32c(0, data, bytes));
    assert_int_equal(file_publish(vfs_posix(), path_in("newer", "MANIFEST"), data, bytes, NULL), 0);
    assert_int_equal(open_code("newer", true), ERR_UNSUPPORTED);
    free(data);
}

static void test_manifests_that_contradict_themselves_are_damage(void **state)
{
    static const struct {
        const char *entry;
        uint64_t value;
        const char *text; /* NULL: value; "-": removed */
    } attacks[] = {
        {"next_number", 3, NULL},
        {"next_number", 0, NULL},
        {"next_number", UINT64_MAX, NULL},
        {"epoch", 2, NULL},
        {"shard", 1, NULL},
        {"uuid", 0, "short"},
        {"collection.1.name", 0, ""},
        {"collection.1.name", 0, "a\nb"},
        {"collection.1.database", 0, ""},
        {"collection.1.load", 2, NULL},
        {"collection.1.created", 0, "-"},
        {"collection.1.alias.0", 0, ""},
        {"collection.1.alias.0", 7, NULL},
        {"generation", 0, NULL},
        {"generation", UINT64_MAX, NULL},
        {"collection.900.name", 0, "far"},
    };
    struct manifest *manifest;
    uint8_t *original, *data;
    size_t original_bytes, bytes;

    (void)state;
    make_sample("contra");
    assert_int_equal(file_read_whole(vfs_posix(), path_in("contra", "MANIFEST"), 1u << 20,
                                     &original, &original_bytes, NULL),
                     0);
    assert_int_equal(file_remove_all(vfs_posix(), path_in("contra", "MANIFEST.1"), NULL), 0);
    for (size_t i = 0; i < sizeof attacks / sizeof attacks[0]; i++) {
        enum error_code code;

        assert_int_equal(
            manifest_decode(MANIFEST_DATA, original, original_bytes, "m", &manifest, NULL), 0);
        if (!attacks[i].text)
            manifest_set_u64(manifest, attacks[i].entry, attacks[i].value, NULL);
        else if (strcmp(attacks[i].text, "-") == 0)
            manifest_remove(manifest, attacks[i].entry);
        else
            manifest_set_text(manifest, attacks[i].entry, attacks[i].text, NULL);
        manifest_encode(manifest, &data, &bytes, NULL);
        assert_int_equal(
            file_publish(vfs_posix(), path_in("contra", "MANIFEST"), data, bytes, NULL), 0);
        code = open_code("contra", true);
        if (code != ERR_CORRUPT)
            fail_msg("attack %zu on %s gives %s", i, attacks[i].entry, error_code_name(code));
        free(data);
        manifest_free(manifest);
    }
    free(original);
}

static void test_entries_of_a_later_version_survive_changes(void **state)
{
    struct data_collection changed;
    struct data_directory *dd;
    struct manifest *manifest;

    (void)state;
    make_sample("later");
    assert_int_equal(
        manifest_read(vfs_posix(), MANIFEST_DATA, path_in("later", "MANIFEST"), &manifest, NULL),
        0);
    manifest_set_u64(manifest, "collection.1.colour", 3, NULL);
    manifest_set_u64(manifest, "collection.2.colour", 4, NULL);
    manifest_set_text(manifest, "motto", "onward", NULL);
    assert_int_equal(manifest_publish(vfs_posix(), path_in("later", "MANIFEST"), 4, manifest, NULL),
                     MANIFEST_DONE);
    manifest_free(manifest);
    dd = must_open("later");
    changed = *data_directory_get(dd, 1);
    changed.alias_count = 0;
    assert_int_equal(data_directory_update(dd, &changed, NULL), 0);
    assert_int_equal(data_directory_remove(dd, 2, NULL), 0);
    data_directory_close(dd);
    assert_int_equal(
        manifest_read(vfs_posix(), MANIFEST_DATA, path_in("later", "MANIFEST"), &manifest, NULL),
        0);
    assert_true(manifest_has(manifest, "motto"));
    assert_true(manifest_has(manifest, "collection.1.colour"));
    assert_false(manifest_has(manifest, "collection.1.alias.0"));
    assert_false(manifest_has(manifest, "collection.2.colour"));
    assert_false(manifest_has(manifest, "collection.2.name"));
    manifest_free(manifest);
}

static void test_the_map_of_the_catalogue_grows(void **state)
{
    enum { COUNT = 400000 };
    struct catalogue_entry *entries = calloc(COUNT, sizeof *entries);
    static char names[COUNT][12], database[240];
    uint8_t uuid[CATALOGUE_UUID_BYTES] = {1};
    struct catalogue *catalogue;
    struct catalogue_stats before, after;
    struct error err = ERROR_INIT;
    char reason[256], path[] = "/var/tmp/annd-catalogue-XXXXXX"; /* too large for memory */
    uint64_t number;
    bool flag;

    (void)state;
    assert_non_null(mkdtemp(path));
    memset(database, 'd', sizeof database - 1);
    for (uint32_t i = 0; i < COUNT; i++) {
        snprintf(names[i], sizeof names[i], "c%u", i);
        entries[i] = (struct catalogue_entry){database, names[i], i + 1, i % 2 == 1};
    }
    assert_int_equal(catalogue_open(vfs_posix(), path, uuid, 1, &catalogue, &flag, reason, &err),
                     0);
    assert_true(flag);
    assert_string_equal(reason, "");
    assert_int_equal(catalogue_replace(catalogue, entries, 1, &err), 0);
    assert_int_equal(catalogue_stats_get(catalogue, &before, &err), 0);
    if (catalogue_replace(catalogue, entries, COUNT, &err) < 0)
        fail_msg("%s", err.message);
    assert_int_equal(catalogue_stats_get(catalogue, &after, &err), 0);
    assert_true(after.map_bytes > before.map_bytes);
    assert_int_equal(after.name_count + after.alias_count, COUNT);
    assert_int_equal(catalogue_close(catalogue, 1, &err), 0);
    /* Taken over at its size. */
    assert_int_equal(catalogue_open(vfs_posix(), path, uuid, 1, &catalogue, &flag, reason, &err),
                     0);
    assert_false(flag);
    assert_int_equal(catalogue_find(catalogue, database, "c399999", &number, &flag, &err), 0);
    assert_int_equal(number, COUNT);
    assert_true(flag);
    assert_int_equal(catalogue_find(catalogue, database, "c400000", &number, &flag, &err), -1);
    assert_int_equal(err.code, ERR_NOT_FOUND);
    assert_int_equal(catalogue_close(catalogue, 0, NULL), 0);
    assert_int_equal(file_remove_all(vfs_posix(), path, NULL), 0);
    free(entries);
}

/* Opens through `vfs`, adds one collection, renames another, closes. */
static int work(struct vfs *vfs, const char *name, bool *added, bool *renamed)
{
    struct data_collection collection = {.name = "maps", .aliases = NULL};
    struct data_directory *dd = NULL;
    char path[FILE_PATH_MAX];

    *added = false;
    *renamed = false;
    if (data_directory_open(vfs, path_in(name, NULL), true, &dd, NULL) < 0)
        return -1;
    collection.number = data_directory_new_number(dd);
    assert_int_equal(data_directory_collection_path(dd, collection.number, path, NULL), 0);
    assert_int_equal(file_mkdir(vfs_posix(), path, NULL), 0);
    *added = data_directory_add(dd, &collection, NULL) == 0;
    collection = *data_directory_get(dd, 2);
    collection.name = "movies";
    *renamed = data_directory_update(dd, &collection, NULL) == 0;
    /* Memory goes along with what was promised. */
    assert_int_equal(number_of(dd, NULL, "maps") != 0, *added);
    assert_int_equal(number_of(dd, NULL, "movies"), *renamed ? 2 : 0);
    assert_int_equal(number_of(dd, NULL, "films"), *renamed ? 0 : 2);
    data_directory_close(dd);
    return 0;
}

static void sweep(const struct vfs_fault_plan *kind)
{
    struct vfs_fault fault;
    bool added, renamed;
    uint64_t calls;

    vfs_fault_init(&fault, vfs_posix());
    make_sample("sweep");
    vfs_fault_plan(&fault, NULL);
    assert_int_equal(work(&fault.vfs, "sweep", &added, &renamed), 0);
    assert_true(added && renamed);
    calls = vfs_fault_calls(&fault, kind->call);
    assert_true(calls > 0);
    for (uint64_t nth = 1; nth <= calls; nth++) {
        struct vfs_fault_plan plan = *kind;
        struct data_directory *dd;

        assert_int_equal(file_remove_all(vfs_posix(), path_in("sweep", NULL), NULL), 0);
        make_sample("sweep");
        plan.nth = nth;
        vfs_fault_plan(&fault, &plan);
        work(&fault.vfs, "sweep", &added, &renamed);
        vfs_fault_plan(&fault, NULL);
        assert_int_equal(vfs_fault_files_open(&fault), 0);
        /* What was promised is there; what was not may be. */
        dd = must_open("sweep");
        if ((added && number_of(dd, NULL, "maps") == 0) ||
            (renamed && number_of(dd, NULL, "movies") != 2))
            fail_msg("call %lu failed and took a finished change with it", (unsigned long)nth);
        assert_int_equal(number_of(dd, NULL, "latest"), 1);
        assert_int_equal(number_of(dd, "other", "films"), 3);
        assert_true((number_of(dd, NULL, "movies") == 2) != (number_of(dd, NULL, "films") == 2));
        data_directory_close(dd);
    }
    assert_int_equal(file_remove_all(vfs_posix(), path_in("sweep", NULL), NULL), 0);
    vfs_fault_release(&fault);
}

static void test_no_failing_call_loses_a_finished_change(void **state)
{
    (void)state;
    sweep(&(struct vfs_fault_plan){.errno_value = EIO});
    sweep(&(struct vfs_fault_plan){
        .call = VFS_CALL_WRITE, .effect = VFS_EFFECT_TEAR_ERRNO, .errno_value = ENOSPC});
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_collections_are_there_after_a_restart),
        cmocka_unit_test(test_names_change_and_go),
        cmocka_unit_test(test_taken_and_impossible_names_are_refused),
        cmocka_unit_test(test_a_folder_is_made_only_when_asked_and_free),
        cmocka_unit_test(test_a_second_owner_is_refused),
        cmocka_unit_test(test_a_killed_owner_leaves_lock_and_truth_in_order),
        cmocka_unit_test(test_junk_and_leftovers_are_told_apart),
        cmocka_unit_test(test_a_missing_catalogue_changes_no_answer),
        cmocka_unit_test(test_a_damaged_catalogue_changes_no_answer),
        cmocka_unit_test(test_a_sealed_catalogue_of_another_time_or_place_is_not_taken),
        cmocka_unit_test(test_a_catalogue_that_cannot_be_opened_is_done_without),
        cmocka_unit_test(test_a_damaged_manifest_gives_way_to_the_one_before),
        cmocka_unit_test(test_two_damaged_manifests_are_an_error_and_nothing_is_lost),
        cmocka_unit_test(test_a_newer_manifest_is_refused_not_replaced),
        cmocka_unit_test(test_manifests_that_contradict_themselves_are_damage),
        cmocka_unit_test(test_entries_of_a_later_version_survive_changes),
        cmocka_unit_test(test_the_map_of_the_catalogue_grows),
        cmocka_unit_test(test_no_failing_call_loses_a_finished_change),
    };

    return cmocka_run_group_tests_name("catalogue", tests, make_folder, remove_folder);
}
