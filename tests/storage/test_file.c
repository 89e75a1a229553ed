/* storage/vfs and storage/file, over the real file system and over one that fails. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "storage/file.h"
#include "tests/support/vfs_fault.h"

static char folder[FILE_PATH_MAX]; /* fresh for each test */

/* A path in the folder; a few stay valid at a time. */
static const char *at(const char *name)
{
    static char paths[8][FILE_PATH_MAX];
    static unsigned next;
    char *path = paths[next++ % 8];

    assert_int_equal(file_path_join(path, folder, name, NULL), 0);
    return path;
}

static int setup(void **state)
{
    const char *parent = getenv("TMPDIR");

    (void)state;
    snprintf(folder, sizeof folder, "%s/annd-test-file-XXXXXX", parent ? parent : "/var/tmp");
    return mkdtemp(folder) ? 0 : -1;
}

static int teardown(void **state)
{
    (void)state;
    return file_remove_all(vfs_posix(), folder, NULL);
}

static void put(const char *path, const void *data, size_t bytes)
{
    FILE *file = fopen(path, "wb");

    assert_non_null(file);
    assert_int_equal(fwrite(data, 1, bytes, file), bytes);
    assert_int_equal(fclose(file), 0);
}

static void assert_content(const char *path, const void *data, size_t bytes)
{
    struct error err = ERROR_INIT;
    uint8_t *found = NULL;
    size_t found_bytes = 0;

    if (file_read_whole(vfs_posix(), path, SIZE_MAX, &found, &found_bytes, &err) < 0)
        fail_msg("%s", err.message);
    assert_int_equal(found_bytes, bytes);
    assert_memory_equal(found, data, bytes);
    assert_int_equal(found[bytes], 0);
    free(found);
}

static uint8_t *pattern(size_t bytes, unsigned seed)
{
    uint8_t *data = file_buffer_alloc(bytes);

    assert_non_null(data);
    for (size_t i = 0; i < bytes; i++)
        data[i] = (uint8_t)((i * 31 + i / 4096 * 7 + seed) & 0xFF);
    return data;
}

/* the real file system */

static void test_what_is_written_is_read(void **state)
{
    struct error err = ERROR_INIT;
    struct vfs *vfs = vfs_posix();
    uint8_t *data = pattern(3 * 4096, 1);
    uint8_t *found = file_buffer_alloc(3 * 4096);

    (void)state;
    /* Buffered and direct must not differ. */
    for (unsigned direct = 0; direct <= VFS_DIRECT; direct += VFS_DIRECT) {
        const char *path = at(direct ? "direct" : "buffered");
        uint64_t bytes = 0;
        struct vfs_file *file = file_open(vfs, path, VFS_WRITE | VFS_CREATE | direct, &err);

        assert_non_null(file);
        assert_true(fcntl(file->fd, F_GETFD) & FD_CLOEXEC);
        assert_false(fcntl(file->fd, F_GETFL) & O_NONBLOCK);
        assert_int_equal(vfs->allocate(file, 0, 3 * 4096), 0);
        assert_int_equal(file_write_full(file, path, data, 3 * 4096, 0, &err), 0);
        assert_int_equal(vfs->sync(file, true), 0);
        assert_int_equal(file_sync(file, path, &err), 0);
        assert_int_equal(file_close(file, path, &err), 0);

        file = file_open(vfs, path, VFS_READ | direct, &err);
        assert_non_null(file);
        assert_int_equal(file_size(file, path, &bytes, &err), 0);
        assert_int_equal(bytes, 3 * 4096);
        memset(found, 0, 3 * 4096);
        assert_int_equal(file_read_exact(file, path, found, 2 * 4096, 4096, &err), 0);
        assert_memory_equal(found, data + 4096, 2 * 4096);
        assert_int_equal(file_read_exact(file, path, found, 0, 1 << 20, &err), 0);
        assert_int_equal(file_close(file, path, &err), 0);
    }
    free(data);
    free(found);
}

static void test_a_read_past_the_end_says_where_the_file_ends(void **state)
{
    static const size_t lengths[] = {0, 100, 4096, 5000};
    struct vfs *vfs = vfs_posix();
    uint8_t *data = pattern(8192, 2);
    uint8_t *found = file_buffer_alloc(8192);

    (void)state;
    for (size_t i = 0; i < 4; i++)
        for (unsigned direct = 0; direct <= VFS_DIRECT; direct += VFS_DIRECT) {
            struct error err = ERROR_INIT;
            char wanted[64];
            struct vfs_file *file;

            put(at("f"), data, lengths[i]);
            file = file_open(vfs, at("f"), VFS_READ | direct, &err);
            assert_non_null(file);
            assert_int_equal(file_read_exact(file, at("f"), found, 8192, 0, &err), -1);
            assert_int_equal(err.code, ERR_CORRUPT);
            snprintf(wanted, sizeof wanted, "ends at byte %zu,", lengths[i]);
            assert_non_null(strstr(err.message, wanted));
            assert_non_null(strstr(err.message, at("f")));
            file_close(file, at("f"), NULL);
        }
    free(data);
    free(found);
}

static void test_create_refuses_a_file_that_is_there(void **state)
{
    struct error err = ERROR_INIT;

    (void)state;
    put(at("f"), "x", 1);
    assert_null(file_open(vfs_posix(), at("f"), VFS_WRITE | VFS_CREATE | VFS_DIRECT, &err));
    assert_int_equal(err.code, ERR_EXISTS);
    assert_non_null(strstr(err.message, at("f")));
    assert_content(at("f"), "x", 1);
}

static void test_open_refuses_what_is_no_regular_file(void **state)
{
    struct error err = ERROR_INIT;

    (void)state;
    assert_int_equal(mkfifo(at("fifo"), 0600), 0);
    assert_null(file_open(vfs_posix(), at("fifo"), VFS_READ, &err)); /* and does not hang */
    assert_int_equal(err.code, ERR_IO);
    error_clear(&err);
    assert_null(file_open(vfs_posix(), folder, VFS_READ, &err));
    assert_int_equal(err.code, ERR_IO);
    error_clear(&err);
    assert_null(file_open(vfs_posix(), "/dev/zero", VFS_READ, &err));
    error_clear(&err);
    assert_null(file_open(vfs_posix(), at("absent"), VFS_READ, &err));
    assert_int_equal(err.code, ERR_NOT_FOUND);
}

static void test_a_lock_has_one_holder(void **state)
{
    struct vfs *vfs = vfs_posix();
    struct vfs_file *first = file_open(vfs, at("lock"), VFS_WRITE | VFS_OPEN_OR_CREATE, NULL);
    struct vfs_file *second = file_open(vfs, at("lock"), VFS_WRITE | VFS_OPEN_OR_CREATE, NULL);

    (void)state;
    assert_non_null(first);
    assert_non_null(second);
    assert_int_equal(vfs->lock(first), 0);
    assert_int_equal(vfs->lock(second), -EWOULDBLOCK);
    file_close(first, "lock", NULL);
    assert_int_equal(vfs->lock(second), 0);
    file_close(second, "lock", NULL);
    assert_int_equal(file_close(NULL, "none", NULL), 0);
}

static void test_the_other_calls_do_what_they_say(void **state)
{
    struct error err = ERROR_INIT;
    struct vfs *vfs = vfs_posix();
    struct vfs_stat a, b;
    struct vfs_file *file;
    uint64_t bytes = 0;

    (void)state;
    assert_int_equal(file_mkdir(vfs, at("d"), &err), 0);
    assert_int_equal(file_mkdir(vfs, at("d"), &err), -1);
    assert_int_equal(err.code, ERR_EXISTS);
    error_clear(&err);
    put(at("d/a"), "12345", 5);
    assert_int_equal(vfs->link(vfs, at("d/a"), at("d/b")), 0);
    assert_int_equal(file_stat(vfs, at("d/a"), &a, &err), 0);
    assert_int_equal(file_stat(vfs, at("d"), &b, &err), 0);
    assert_int_equal(a.kind, VFS_FILE);
    assert_int_equal(a.bytes, 5);
    assert_int_equal(b.kind, VFS_DIRECTORY);
    assert_true(a.device == b.device);
    assert_int_equal(file_rename(vfs, at("d/a"), at("d/c"), &err), 0);
    assert_int_equal(file_dirsync(vfs, at("d"), &err), 0);
    assert_false(file_exists(vfs, at("d/a")));
    assert_true(file_exists(vfs, at("d/c")));
    assert_int_equal(vfs->rmdir(vfs, at("d")), -ENOTEMPTY);
    file = file_open(vfs, at("d/c"), VFS_WRITE, &err);
    assert_non_null(file);
    assert_int_equal(vfs->truncate(file, 3), 0);
    assert_int_equal(file_close(file, at("d/c"), &err), 0);
    assert_content(at("d/b"), "123", 3); /* the link is the same file */
    assert_int_equal(vfs->space(vfs, folder, &bytes), 0);
    assert_true(bytes > 0);
    assert_int_equal(file_rename(vfs, at("nobody"), at("d/c"), &err), -1);
    assert_int_equal(err.code, ERR_NOT_FOUND);
    error_clear(&err);
    assert_int_equal(file_stat(vfs, at("nobody"), &a, &err), -1);
    assert_int_equal(err.code, ERR_NOT_FOUND);
    error_clear(&err);
    assert_int_equal(file_dirsync(vfs, at("nobody"), &err), -1);
    assert_int_equal(err.code, ERR_NOT_FOUND);
}

static void test_read_whole_keeps_to_its_limit(void **state)
{
    struct error err = ERROR_INIT;
    uint8_t *data = NULL;
    size_t bytes = 7;

    (void)state;
    put(at("f"), "12345", 5);
    assert_int_equal(file_read_whole(vfs_posix(), at("f"), 4, &data, &bytes, &err), -1);
    assert_int_equal(err.code, ERR_INVALID);
    error_clear(&err);
    assert_int_equal(file_read_whole(vfs_posix(), at("f"), 5, &data, &bytes, &err), 0);
    assert_int_equal(bytes, 5);
    assert_string_equal((char *)data, "12345");
    free(data);
    put(at("empty"), "", 0);
    assert_int_equal(file_read_whole(vfs_posix(), at("empty"), 0, &data, &bytes, &err), 0);
    assert_int_equal(bytes, 0);
    assert_string_equal((char *)data, "");
    free(data);
}

static void test_a_listing_is_sorted(void **state)
{
    struct error err = ERROR_INIT;
    char **names = NULL;
    uint32_t count = 99;

    (void)state;
    assert_int_equal(file_list(vfs_posix(), folder, &names, &count, &err), 0);
    assert_int_equal(count, 0);
    file_names_free(names, count);
    for (int i = 0; i < 50; i++) {
        char name[16];

        snprintf(name, sizeof name, "n%02d", i * 37 % 50);
        put(at(name), "", 0);
    }
    assert_int_equal(mkdir(at("d"), 0700), 0);
    assert_int_equal(file_list(vfs_posix(), folder, &names, &count, &err), 0);
    assert_int_equal(count, 51);
    assert_string_equal(names[0], "d");
    for (uint32_t i = 1; i < count; i++)
        assert_true(strcmp(names[i - 1], names[i]) < 0);
    file_names_free(names, count);
    assert_int_equal(file_list(vfs_posix(), at("absent"), &names, &count, &err), -1);
    assert_int_equal(err.code, ERR_NOT_FOUND);
}

static void note_kind(void *context, const char *name, enum vfs_kind kind)
{
    enum vfs_kind *kinds = context;

    kinds[name[0] - 'a'] = kind;
}

static void test_a_listing_knows_links_from_what_they_point_to(void **state)
{
    enum vfs_kind kinds[3] = {VFS_OTHER, VFS_OTHER, VFS_FILE};

    (void)state;
    put(at("a"), "", 0);
    assert_int_equal(mkdir(at("b"), 0700), 0);
    assert_int_equal(symlink("b", at("c")), 0);
    assert_int_equal(vfs_posix()->list(vfs_posix(), folder, note_kind, kinds), 0);
    assert_int_equal(kinds[0], VFS_FILE);
    assert_int_equal(kinds[1], VFS_DIRECTORY);
    assert_int_equal(kinds[2], VFS_OTHER);
}

static void make_tree(void)
{
    assert_int_equal(mkdir(at("t"), 0700), 0);
    assert_int_equal(mkdir(at("t/u"), 0700), 0);
    assert_int_equal(mkdir(at("t/u/empty"), 0700), 0);
    put(at("t/a"), "a", 1);
    put(at("t/u/b"), "b", 1);
    put(at("t/u/c"), "c", 1);
}

static void test_remove_all_takes_the_tree_and_nothing_else(void **state)
{
    struct error err = ERROR_INIT;

    (void)state;
    make_tree();
    assert_int_equal(mkdir(at("kept"), 0700), 0);
    put(at("kept/f"), "f", 1);
    assert_int_equal(symlink("../kept", at("t/link")), 0);
    assert_int_equal(symlink("../../kept/f", at("t/u/link")), 0);
    assert_int_equal(file_remove_all(vfs_posix(), at("t"), &err), 0);
    assert_false(file_exists(vfs_posix(), at("t")));
    assert_content(at("kept/f"), "f", 1);
    /* A link to a folder is a link. */
    assert_int_equal(symlink("kept", at("link")), 0);
    assert_int_equal(file_remove_all(vfs_posix(), at("link"), &err), 0);
    assert_content(at("kept/f"), "f", 1);
    assert_int_equal(file_remove_all(vfs_posix(), at("kept/f"), &err), 0);
    assert_false(file_exists(vfs_posix(), at("kept/f")));
    assert_int_equal(file_remove_all(vfs_posix(), at("absent"), &err), 0);
    assert_int_equal(err.code, ERR_NONE);
}

static void test_paths_are_joined_and_cut(void **state)
{
    static const char *const folders[][2] = {
        {"a/b", "a"}, {"a", "."},    {"/a", "/"},    {"/", "/"},   {"a/b/", "a"},
        {"", "."},    {"a//b", "a"}, {"//a", "/"},   {"./a", "."}, {"/a/b/c", "/a/b"},
        {"a/", "."},  {"///", "/"},  {"../a", ".."},
    };
    static char long_name[FILE_PATH_MAX + 8];
    struct error err = ERROR_INIT;
    char out[FILE_PATH_MAX];

    (void)state;
    assert_int_equal(file_path_join(out, "a", "b", &err), 0);
    assert_string_equal(out, "a/b");
    assert_int_equal(file_path_join(out, "a/", "b", &err), 0);
    assert_string_equal(out, "a/b");
    assert_int_equal(file_path_join(out, "/", "b", &err), 0);
    assert_string_equal(out, "/b");
    assert_int_equal(file_path_join(out, "", "b", &err), 0);
    assert_string_equal(out, "b");
    memset(long_name, 'x', sizeof long_name - 1);
    long_name[FILE_PATH_MAX - 3] = '\0';
    assert_int_equal(file_path_join(out, "a", long_name, &err), 0);
    assert_int_equal(strlen(out), FILE_PATH_MAX - 1);
    long_name[FILE_PATH_MAX - 3] = 'x';
    long_name[FILE_PATH_MAX - 2] = '\0';
    assert_int_equal(file_path_join(out, "a", long_name, &err), -1);
    assert_int_equal(err.code, ERR_INVALID);
    error_clear(&err);
    assert_int_equal(file_publish(vfs_posix(), long_name, "x", 1, &err), -1);
    assert_int_equal(err.code, ERR_INVALID);
    error_clear(&err);
    long_name[FILE_PATH_MAX - 2] = 'x';
    assert_int_equal(file_remove_all(vfs_posix(), long_name, &err), -1);
    assert_int_equal(err.code, ERR_INVALID);
    long_name[FILE_PATH_MAX + 4] = '/';
    file_path_folder(out, long_name);
    assert_string_equal(out, "");
    for (size_t i = 0; i < sizeof folders / sizeof folders[0]; i++) {
        file_path_folder(out, folders[i][0]);
        assert_string_equal(out, folders[i][1]);
    }
}

static void test_buffers_are_block_aligned(void **state)
{
    (void)state;
    for (size_t bytes = 0; bytes < 3 * 4096; bytes += 1000) {
        void *buffer = file_buffer_alloc(bytes);

        assert_non_null(buffer);
        assert_int_equal((uintptr_t)buffer % FILE_BLOCK_BYTES, 0);
        memset(buffer, 1, bytes);
        free(buffer);
    }
    assert_null(file_buffer_alloc(SIZE_MAX));
}

static void test_publish_replaces_the_content_and_a_leftover(void **state)
{
    struct error err = ERROR_INIT;

    (void)state;
    put(at("f.tmp"), "left over and longer than the rest", 34);
    assert_int_equal(file_publish(vfs_posix(), at("f"), "one", 3, &err), 0);
    assert_content(at("f"), "one", 3);
    assert_int_equal(file_publish(vfs_posix(), at("f"), "", 0, &err), 0);
    assert_content(at("f"), "", 0);
    assert_int_equal(file_publish(vfs_posix(), at("f"), "three", 5, &err), 0);
    assert_content(at("f"), "three", 5);
    assert_false(file_exists(vfs_posix(), at("f.tmp")));
    assert_int_equal(file_publish(vfs_posix(), at("absent/f"), "x", 1, &err), -1);
    assert_int_equal(err.code, ERR_NOT_FOUND);
}

/* a file system that fails */

static const int errnos[] = {EIO, ENOSPC, EINTR, EAGAIN, EDQUOT, ENOMEM, EMFILE, EACCES};
#define ERRNO_COUNT (sizeof errnos / sizeof errnos[0])

static enum error_code code_for(int errno_value)
{
    struct error err = ERROR_INIT;

    error_set_errno(&err, errno_value, "x");
    return err.code;
}

static void test_publish_leaves_old_or_new_whatever_call_fails(void **state)
{
    struct vfs_fault fault;
    uint64_t calls;

    (void)state;
    vfs_fault_init(&fault, vfs_posix());
    put(at("f"), "old", 3);
    assert_int_equal(file_publish(&fault.vfs, at("f"), "new!", 4, NULL), 0);
    calls = vfs_fault_calls(&fault, VFS_CALL_ANY);
    assert_true(calls >= 6); /* unlink, open, write, sync, close, rename, dirsync */
    for (uint64_t nth = 1; nth <= calls; nth++)
        for (size_t e = 0; e < ERRNO_COUNT; e++)
            for (int for_ever = 0; for_ever <= 1; for_ever++) {
                struct vfs_fault_plan plan = {
                    .nth = nth, .errno_value = errnos[e], .for_ever = for_ever != 0};
                struct error err = ERROR_INIT;
                int rc;

                put(at("f"), "old", 3);
                put(at("f.tmp"), "left over", 9);
                vfs_fault_plan(&fault, &plan);
                rc = file_publish(&fault.vfs, at("f"), "new!", 4, &err);
                assert_true(vfs_fault_fired(&fault) > 0);
                assert_int_equal(vfs_fault_files_open(&fault), 0);
                if (rc == 0) {
                    /* Only an interrupted call is worth a second try. */
                    assert_true(errnos[e] == EINTR && !for_ever);
                    assert_int_equal(err.code, ERR_NONE);
                    assert_content(at("f"), "new!", 4);
                } else {
                    assert_int_equal(err.code, code_for(errnos[e]));
                    assert_non_null(strstr(err.message, strerror(errnos[e])));
                    assert_non_null(strstr(err.message, folder));
                    /* Only the sync of the folder comes after the rename. */
                    if (nth < calls)
                        assert_content(at("f"), "old", 3);
                    else
                        assert_content(at("f"), "new!", 4);
                }
                if (!for_ever && nth > 1)
                    assert_false(file_exists(vfs_posix(), at("f.tmp")));
                /* One sync, whatever it said. */
                assert_true(vfs_fault_calls(&fault, VFS_CALL_SYNC) <= 1);
                vfs_fault_plan(&fault, NULL);
                assert_int_equal(file_publish(&fault.vfs, at("f"), "next", 4, NULL), 0);
                assert_content(at("f"), "next", 4);
            }
    vfs_fault_release(&fault);
}

static void test_read_whole_fails_cleanly_whatever_call_fails(void **state)
{
    struct vfs_fault fault;
    uint8_t *data = pattern(10000, 3);
    uint64_t calls;

    (void)state;
    vfs_fault_init(&fault, vfs_posix());
    put(at("f"), data, 10000);
    for (uint64_t nth = 0; nth <= 4; nth++)
        for (size_t e = 0; e < ERRNO_COUNT; e++)
            for (int for_ever = 0; for_ever <= 1; for_ever++) {
                struct vfs_fault_plan plan = {
                    .nth = nth, .errno_value = errnos[e], .for_ever = for_ever != 0};
                struct error err = ERROR_INIT;
                uint8_t *found = NULL;
                size_t bytes = 0;
                int rc;

                vfs_fault_plan(&fault, &plan);
                rc = file_read_whole(&fault.vfs, at("f"), 10000, &found, &bytes, &err);
                calls = vfs_fault_calls(&fault, VFS_CALL_ANY);
                if (rc == 0) {
                    assert_int_equal(bytes, 10000);
                    assert_memory_equal(found, data, 10000);
                    /* Closing takes nothing away; an interruption is tried again. */
                    assert_true(nth == 0 || nth == calls || errnos[e] == EINTR);
                } else {
                    assert_int_equal(err.code, code_for(errnos[e]));
                    assert_null(found);
                }
                free(found);
                assert_int_equal(vfs_fault_files_open(&fault), 0);
            }
    free(data);
    vfs_fault_release(&fault);
}

static void test_remove_all_and_list_report_what_fails(void **state)
{
    struct vfs_fault fault;
    uint64_t calls;

    (void)state;
    vfs_fault_init(&fault, vfs_posix());
    make_tree();
    assert_int_equal(file_remove_all(&fault.vfs, at("t"), NULL), 0);
    calls = vfs_fault_calls(&fault, VFS_CALL_ANY);
    for (uint64_t nth = 1; nth <= calls; nth++)
        for (int for_ever = 0; for_ever <= 1; for_ever++) {
            struct vfs_fault_plan plan = {
                .nth = nth, .errno_value = EIO, .for_ever = for_ever != 0};
            struct error err = ERROR_INIT;

            make_tree();
            vfs_fault_plan(&fault, &plan);
            assert_int_equal(file_remove_all(&fault.vfs, at("t"), &err), -1);
            assert_int_equal(err.code, ERR_IO);
            vfs_fault_plan(&fault, NULL);
            assert_int_equal(file_remove_all(&fault.vfs, at("t"), NULL), 0);
            assert_false(file_exists(vfs_posix(), at("t")));
        }
    vfs_fault_release(&fault);
}

static void test_each_wrapper_reports_the_errno_and_the_path(void **state)
{
    struct vfs_fault fault;
    struct vfs *vfs = &fault.vfs;
    struct vfs_fault_plan plan = {.nth = 1, .errno_value = ENOSPC, .for_ever = true};

    (void)state;
    vfs_fault_init(&fault, vfs_posix());
    for (int which = 0; which < 8; which++) {
        struct error err = ERROR_INIT;
        struct vfs_file *file = file_open(vfs, at("f"), VFS_WRITE | VFS_OPEN_OR_CREATE, NULL);
        struct vfs_stat st;
        uint64_t bytes;
        char **names;
        uint32_t count;
        int rc = 0;

        assert_non_null(file);
        vfs_fault_plan(&fault, &plan);
        if (which == 0)
            rc = file_size(file, at("f"), &bytes, &err);
        else if (which == 1)
            rc = file_sync(file, at("f"), &err);
        else if (which == 2)
            rc = file_stat(vfs, at("f"), &st, &err);
        else if (which == 3)
            rc = file_mkdir(vfs, at("f"), &err);
        else if (which == 4)
            rc = file_rename(vfs, at("f"), at("g"), &err);
        else if (which == 5)
            rc = file_dirsync(vfs, at("f"), &err);
        else if (which == 6)
            rc = file_list(vfs, at("f"), &names, &count, &err);
        else
            rc = file_close(file, at("f"), &err);
        assert_int_equal(rc, -1);
        assert_int_equal(err.code, ERR_NO_SPACE);
        assert_non_null(strstr(err.message, at("f")));
        assert_false(file_exists(vfs, at("f")));
        vfs_fault_plan(&fault, NULL);
        if (which != 7)
            assert_int_equal(file_close(file, at("f"), NULL), 0);
        assert_int_equal(vfs_fault_files_open(&fault), 0);
    }
    vfs_fault_release(&fault);
}

static void test_short_transfers_are_resumed(void **state)
{
    static const uint64_t parts[] = {0, 1, 4095, 4096, 4097, 9000};
    enum { BYTES = 5 * 4096 };
    struct vfs_fault fault;
    uint8_t *data = pattern(BYTES, 4);
    uint8_t *found = file_buffer_alloc(BYTES);

    (void)state;
    vfs_fault_init(&fault, vfs_posix());
    /* Lengths and offsets in whole blocks and not, and every place a call can be cut. */
    for (size_t p = 0; p < sizeof parts / sizeof parts[0]; p++)
        for (size_t bytes = BYTES; bytes >= BYTES - 1; bytes--)
            for (uint64_t offset = 0; offset <= 4097; offset += 4097)
                for (uint64_t nth = 1; nth <= 3; nth++) {
                    struct vfs_fault_plan plan = {
                        .nth = nth, .effect = VFS_EFFECT_SHORT, .bytes = parts[p]};
                    struct error err = ERROR_INIT;
                    struct vfs_file *file;

                    unlink(at("f"));
                    file = file_open(&fault.vfs, at("f"), VFS_WRITE | VFS_CREATE, &err);
                    assert_non_null(file);
                    plan.call = VFS_CALL_WRITE;
                    vfs_fault_plan(&fault, &plan);
                    if (file_write_full(file, at("f"), data, bytes, offset, &err) < 0)
                        fail_msg("%s", err.message);
                    memset(found, 0, BYTES);
                    plan.call = VFS_CALL_READ;
                    vfs_fault_plan(&fault, &plan);
                    if (file_read_exact(file, at("f"), found, bytes, offset, &err) < 0)
                        fail_msg("%s", err.message);
                    assert_memory_equal(found, data, bytes);
                    file_close(file, at("f"), NULL);
                }
    free(data);
    free(found);
    vfs_fault_release(&fault);
}

static void test_direct_transfers_resume_at_a_block(void **state)
{
    enum { BYTES = 4 * 4096 };
    struct vfs_fault fault;
    uint8_t *data = pattern(BYTES, 5);
    uint8_t *found = file_buffer_alloc(BYTES);
    struct error err = ERROR_INIT;
    struct vfs_fault_plan plan = {
        .nth = 1, .effect = VFS_EFFECT_SHORT, .bytes = 4096 + 512, .call = VFS_CALL_WRITE};
    struct vfs_file *file;

    (void)state;
    vfs_fault_init(&fault, vfs_posix());
    file = file_open(&fault.vfs, at("f"), VFS_WRITE | VFS_CREATE | VFS_DIRECT, &err);
    assert_non_null(file);
    /* The short part must itself be one that the device takes. */
    vfs_fault_plan(&fault, &plan);
    if (file_write_full(file, at("f"), data, BYTES, 0, &err) < 0) {
        error_clear(&err);
        plan.bytes = 4096;
        vfs_fault_plan(&fault, &plan);
        assert_int_equal(file_write_full(file, at("f"), data, BYTES, 0, &err), 0);
    }
    plan.call = VFS_CALL_READ;
    plan.bytes = 4096 + 700;
    vfs_fault_plan(&fault, &plan);
    assert_int_equal(file_read_exact(file, at("f"), found, BYTES, 0, &err), 0);
    assert_memory_equal(found, data, BYTES);
    assert_int_equal(vfs_fault_calls(&fault, VFS_CALL_READ), 2);
    file_close(file, at("f"), NULL);
    free(data);
    free(found);
    vfs_fault_release(&fault);
}

static void test_endless_short_or_interrupted_calls_end(void **state)
{
    static const struct vfs_fault_plan plans[] = {
        {.nth = 1, .for_ever = true, .errno_value = EINTR},
        {.nth = 1, .for_ever = true, .effect = VFS_EFFECT_SHORT, .bytes = 100},
        {.nth = 3, .for_ever = true, .errno_value = EINTR},
    };
    enum { BYTES = 4 * 4096 };
    struct vfs_fault fault;
    uint8_t *data = pattern(BYTES, 6);
    uint8_t *found = file_buffer_alloc(BYTES);

    (void)state;
    vfs_fault_init(&fault, vfs_posix());
    put(at("f"), data, BYTES);
    for (size_t i = 0; i < 3; i++) {
        struct error err = ERROR_INIT;
        struct vfs_fault_plan plan = plans[i];
        struct vfs_file *file = file_open(&fault.vfs, at("f"), VFS_WRITE, NULL);
        int wanted = i == 2 ? 0 : -1; /* the third call does not come */

        assert_non_null(file);
        plan.call = VFS_CALL_READ;
        vfs_fault_plan(&fault, &plan);
        assert_int_equal(file_read_exact(file, at("f"), found, BYTES, 0, &err), wanted);
        assert_int_equal(err.code, wanted ? ERR_IO : ERR_NONE);
        error_clear(&err);
        plan.call = VFS_CALL_WRITE;
        vfs_fault_plan(&fault, &plan);
        assert_int_equal(file_write_full(file, at("f"), data, BYTES, 0, &err), wanted);
        assert_int_equal(err.code, wanted ? ERR_IO : ERR_NONE);
        vfs_fault_plan(&fault, NULL);
        file_close(file, at("f"), NULL);
    }
    free(data);
    free(found);
    vfs_fault_release(&fault);
}

/* the failing file system itself: other tests lean on it */

static void test_faults_spoil_what_they_say(void **state)
{
    struct vfs_fault fault;
    struct vfs_fault_plan plan = {.nth = 1, .call = VFS_CALL_WRITE, .path = "/f"};
    struct vfs_file *file;
    struct vfs_file *other;
    char found[9] = "";
    size_t moved = 0;

    (void)state;
    vfs_fault_init(&fault, vfs_posix());
    file = file_open(&fault.vfs, at("f"), VFS_WRITE | VFS_CREATE, NULL);
    other = file_open(&fault.vfs, at("other"), VFS_WRITE | VFS_CREATE, NULL);
    assert_non_null(file);
    assert_non_null(other);
    assert_int_equal(vfs_fault_files_open(&fault), 2);

    plan.effect = VFS_EFFECT_TEAR;
    plan.bytes = 3;
    vfs_fault_plan(&fault, &plan);
    assert_int_equal(file_write_full(other, "other", "12345678", 8, 0, NULL), 0);
    assert_int_equal(vfs_fault_fired(&fault), 0); /* another path */
    assert_int_equal(file_write_full(file, "f", "12345678", 8, 0, NULL), 0);
    assert_int_equal(vfs_fault_fired(&fault), 1);
    assert_content(at("f"), "123", 3);
    assert_content(at("other"), "12345678", 8);

    plan.effect = VFS_EFFECT_TEAR_ERRNO;
    plan.errno_value = EIO;
    plan.bytes = 5;
    vfs_fault_plan(&fault, &plan);
    assert_int_equal(file_write_full(file, "f", "abcdefgh", 8, 0, NULL), -1);
    assert_content(at("f"), "abcde", 5);

    plan.effect = VFS_EFFECT_FORGET;
    vfs_fault_plan(&fault, &plan);
    assert_int_equal(file_write_full(file, "f", "12345678", 8, 0, NULL), 0);
    assert_content(at("f"), "abcde", 5);

    plan.effect = VFS_EFFECT_FLIP;
    plan.bit = 8 * 2 + 5; /* 'c' to 'C' */
    vfs_fault_plan(&fault, &plan);
    assert_int_equal(file_write_full(file, "f", "abcdefgh", 8, 0, NULL), 0);
    assert_content(at("f"), "abCdefgh", 8);

    plan.call = VFS_CALL_READ;
    vfs_fault_plan(&fault, &plan);
    assert_int_equal(file_read_exact(file, "f", found, 8, 0, NULL), 0);
    assert_string_equal(found, "abcdefgh");
    plan.effect = VFS_EFFECT_TEAR;
    plan.bytes = 4;
    vfs_fault_plan(&fault, &plan);
    assert_int_equal(file_read_exact(file, "f", found, 8, 0, NULL), 0);
    assert_string_equal(found, "abCd\xA5\xA5\xA5\xA5");

    plan = (struct vfs_fault_plan){
        .nth = 2, .call = VFS_CALL_RENAME, .effect = VFS_EFFECT_FORGET, .path = "other"};
    vfs_fault_plan(&fault, &plan);
    assert_int_equal(file_rename(&fault.vfs, at("other"), at("g"), NULL), 0);
    assert_int_equal(file_rename(&fault.vfs, at("g"), at("other"), NULL), 0);
    assert_true(file_exists(vfs_posix(), at("g")));
    assert_int_equal(fault.vfs.pread(file, found, 8, 2, &moved), 0);
    assert_int_equal(moved, 6);
    file_close(file, "f", NULL);
    file_close(other, "other", NULL);
    assert_int_equal(vfs_fault_files_open(&fault), 0);
    vfs_fault_release(&fault);
}

static void test_faults_reach_asynchronous_reads(void **state)
{
    struct vfs_fault fault;
    struct vfs_fault_plan plan = {.nth = 2, .call = VFS_CALL_READ, .errno_value = EIO};
    struct vfs_file *file;
    uint8_t buffer[16] = {0};

    (void)state;
    vfs_fault_init(&fault, vfs_posix());
    put(at("f"), "x", 1);
    file = file_open(&fault.vfs, at("f"), VFS_READ, NULL);
    assert_non_null(file);
    vfs_fault_plan(&fault, &plan);
    assert_int_equal(fault.vfs.read_result(file, buffer, 16, 0, 16), 16);
    assert_int_equal(fault.vfs.read_result(file, buffer, 16, 0, 16), -EIO);
    assert_int_equal(fault.vfs.read_result(file, buffer, 16, 0, 16), 16);
    plan.nth = 1;
    plan.effect = VFS_EFFECT_SHORT;
    vfs_fault_plan(&fault, &plan);
    assert_int_equal(fault.vfs.read_result(file, buffer, 16, 0, 16), 8);
    plan.bytes = 15;
    vfs_fault_plan(&fault, &plan);
    assert_int_equal(fault.vfs.read_result(file, buffer, 16, 0, 4), 4);
    plan.effect = VFS_EFFECT_FLIP;
    plan.bit = 8 * 3;
    vfs_fault_plan(&fault, &plan);
    assert_int_equal(fault.vfs.read_result(file, buffer, 16, 0, 16), 16);
    assert_int_equal(buffer[3], 1);
    vfs_fault_plan(&fault, &plan);
    assert_int_equal(fault.vfs.read_result(file, buffer, 16, 0, -EAGAIN), -EAGAIN);
    file_close(file, "f", NULL);
    vfs_fault_release(&fault);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_what_is_written_is_read, setup, teardown),
        cmocka_unit_test_setup_teardown(test_a_read_past_the_end_says_where_the_file_ends, setup,
                                        teardown),
        cmocka_unit_test_setup_teardown(test_create_refuses_a_file_that_is_there, setup, teardown),
        cmocka_unit_test_setup_teardown(test_open_refuses_what_is_no_regular_file, setup, teardown),
        cmocka_unit_test_setup_teardown(test_a_lock_has_one_holder, setup, teardown),
        cmocka_unit_test_setup_teardown(test_the_other_calls_do_what_they_say, setup, teardown),
        cmocka_unit_test_setup_teardown(test_read_whole_keeps_to_its_limit, setup, teardown),
        cmocka_unit_test_setup_teardown(test_a_listing_is_sorted, setup, teardown),
        cmocka_unit_test_setup_teardown(test_a_listing_knows_links_from_what_they_point_to, setup,
                                        teardown),
        cmocka_unit_test_setup_teardown(test_remove_all_takes_the_tree_and_nothing_else, setup,
                                        teardown),
        cmocka_unit_test_setup_teardown(test_paths_are_joined_and_cut, setup, teardown),
        cmocka_unit_test_setup_teardown(test_buffers_are_block_aligned, setup, teardown),
        cmocka_unit_test_setup_teardown(test_publish_replaces_the_content_and_a_leftover, setup,
                                        teardown),
        cmocka_unit_test_setup_teardown(test_publish_leaves_old_or_new_whatever_call_fails, setup,
                                        teardown),
        cmocka_unit_test_setup_teardown(test_read_whole_fails_cleanly_whatever_call_fails, setup,
                                        teardown),
        cmocka_unit_test_setup_teardown(test_remove_all_and_list_report_what_fails, setup,
                                        teardown),
        cmocka_unit_test_setup_teardown(test_each_wrapper_reports_the_errno_and_the_path, setup,
                                        teardown),
        cmocka_unit_test_setup_teardown(test_short_transfers_are_resumed, setup, teardown),
        cmocka_unit_test_setup_teardown(test_direct_transfers_resume_at_a_block, setup, teardown),
        cmocka_unit_test_setup_teardown(test_endless_short_or_interrupted_calls_end, setup,
                                        teardown),
        cmocka_unit_test_setup_teardown(test_faults_spoil_what_they_say, setup, teardown),
        cmocka_unit_test_setup_teardown(test_faults_reach_asynchronous_reads, setup, teardown),
    };

    return cmocka_run_group_tests_name("file", tests, NULL, NULL);
}
