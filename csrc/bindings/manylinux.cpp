// Old names for what newer systems export anew: built with GCC 12 or later on glibc 2.34 or later,
// the libraries still load on glibc 2.28 with GCC 8's libstdc++, as torch's do (manylinux_2_28).
// tools/build_wheel.py checks it and names what is newer.
//
// Linked into each library: what is defined here, hidden, is found before the systems' own. It is
//   a jump to the version of a function that glibc has had from the first x86-64 on,
//   a copy of what libstdc++ has inline in its headers and exports from GCC 9 or 11 on.
// Without LTO, which does not see names that are defined in assembly.
#include <features.h>

#include <new>
#include <sstream>
#include <string>

#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GLIBCXX__)

#define HIDDEN(name) ".globl " name "\n.hidden " name "\n.type " name ", @function\n" name ":\n"
#define OLD(name, version)                                     \
  asm(".text\n.symver old_" #name ", " #name "@GLIBC_" version \
      "\n" HIDDEN(#name) "jmp old_" #name "@PLT\n.size " #name ", .-" #name "\n");

#if __GLIBC_PREREQ(2, 29)
OLD(exp, "2.2.5")  // that of 2.29 differs in errno alone
#endif

// 2.34 took libpthread, libdl and librt into libc. cudart_static uses them; on older systems they
// are loaded, as libtorch_cpu.so needs them.
#if defined(FASTCNN_WITH_CUDA) && __GLIBC_PREREQ(2, 34)
OLD(dlclose, "2.2.5")
OLD(dlerror, "2.2.5")
OLD(dlmopen, "2.3.4")
OLD(dlopen, "2.2.5")
OLD(dlsym, "2.2.5")
OLD(dlvsym, "2.2.5")
OLD(pthread_condattr_setpshared, "2.2.5")
OLD(pthread_create, "2.2.5")
OLD(pthread_detach, "2.2.5")
OLD(pthread_getspecific, "2.2.5")
OLD(pthread_join, "2.2.5")
OLD(pthread_key_create, "2.2.5")
OLD(pthread_key_delete, "2.2.5")
OLD(pthread_kill, "2.2.5")
OLD(pthread_mutex_trylock, "2.2.5")
OLD(pthread_mutexattr_destroy, "2.2.5")
OLD(pthread_mutexattr_init, "2.2.5")
OLD(pthread_mutexattr_setpshared, "2.2.5")
OLD(pthread_mutexattr_settype, "2.2.5")
OLD(pthread_once, "2.2.5")
OLD(pthread_rwlock_destroy, "2.2.5")
OLD(pthread_rwlock_init, "2.2.5")
OLD(pthread_rwlock_rdlock, "2.2.5")
OLD(pthread_rwlock_timedrdlock, "2.2.5")
OLD(pthread_rwlock_timedwrlock, "2.2.5")
OLD(pthread_rwlock_tryrdlock, "2.2.5")
OLD(pthread_rwlock_trywrlock, "2.2.5")
OLD(pthread_rwlock_unlock, "2.2.5")
OLD(pthread_rwlock_wrlock, "2.2.5")
OLD(pthread_rwlockattr_destroy, "2.2.5")
OLD(pthread_rwlockattr_init, "2.2.5")
OLD(pthread_rwlockattr_setpshared, "2.2.5")
OLD(pthread_setspecific, "2.2.5")
OLD(pthread_spin_destroy, "2.2.5")
OLD(pthread_spin_init, "2.2.5")
OLD(pthread_spin_lock, "2.2.5")
OLD(pthread_spin_trylock, "2.2.5")
OLD(pthread_spin_unlock, "2.2.5")
OLD(sem_destroy, "2.2.5")
OLD(sem_init, "2.2.5")
OLD(sem_post, "2.2.5")
OLD(sem_timedwait, "2.2.5")
OLD(sem_trywait, "2.2.5")
OLD(sem_wait, "2.2.5")
OLD(shm_open, "2.2.5")
OLD(shm_unlink, "2.2.5")
#endif

// glibc 2.32: whether shared_ptr may count without atomics. Never: torch has threads.
asm(".bss\n.globl __libc_single_threaded\n.hidden __libc_single_threaded\n"
    ".type __libc_single_threaded, @object\n.size __libc_single_threaded, 1\n"
    "__libc_single_threaded: .zero 1\n.text\n");

// GCC 11 exports the two halves of what the copy constructor and the destructor, exported before,
// do.
#define EXCEPTION_PTR "_ZNSt15__exception_ptr13exception_ptr"
asm(".text\n" HIDDEN(EXCEPTION_PTR "10_M_releaseEv") "jmp " EXCEPTION_PTR "D1Ev@PLT\n");
asm(".text\n" HIDDEN(EXCEPTION_PTR "9_M_addrefEv")
    // A copy of *this on the stack, which nothing destroys.
    "subq $24, %rsp\nmovq %rdi, %rsi\nleaq 8(%rsp), %rdi\ncall " EXCEPTION_PTR
    "C1ERKS0_@PLT\n"
    "addq $24, %rsp\nret\n");

// GCC 9's default constructors, GCC 11's str().
template std::basic_ostringstream<char>::basic_ostringstream();
template std::basic_stringstream<char>::basic_stringstream();
template std::string std::basic_stringbuf<char>::str() const &;
template std::string std::basic_stringbuf<char>::str() &&;

asm(".hidden _ZSt28__throw_bad_array_new_lengthv");
namespace std {
void __throw_bad_array_new_length() {  // GCC 11
  throw bad_array_new_length();
}
}  // namespace std

#endif
