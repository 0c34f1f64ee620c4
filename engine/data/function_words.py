"""Function words, by script and language: words that carry no topic, and of which every text has many.

Apostrophes part words here (l'homme is "l" and "homme"). A language without any is known by its script alone.
"""

# ruff: noqa: RUF001 - Cyrillic and Greek letters that look like Latin ones are what this file is about

FUNCTION_WORDS: dict[str, dict[str, str]] = {
    "latin": {
        "en": (
            "the of and to in is that it for was on are as with his they at be this have from or had by but not "
            "what all were we when your can said there an each which she do how their if will about would these "
            "has more"
        ),
        "de": (
            "der die und das den von zu mit sich des ist im für dem nicht ein eine als auch es an werden aus er "
            "hat dass sie nach wird bei einer um am sind noch wie einem über so zum war haben nur oder aber vor "
            "zur bis mehr durch man sein wurde ich wir"
        ),
        "fr": (
            "le la les de des du et en un une est que qui dans pour pas sur au aux avec ce cette il elle ils ne "
            "se sont par plus ou mais nous vous leur ses son sa comme tout l d qu c n s j été être ont avait même "
            "où"
        ),
        "es": (
            "el la los las de que y en un una es por con para no se del al lo como más pero sus le ha su me si "
            "sin sobre este esta ya entre cuando todo ser son también fue había muy hasta desde está nos porque "
            "qué"
        ),
        "it": (
            "il lo la i gli le di che e è in un una per non con del della dei delle da al alla si come più ma "
            "anche sono ha nel nella questo questa o se su dal dalla essere l d un stato era ci loro tutti quando"
        ),
        "pt": (
            "o a os as de que e em um uma é do da dos das no na nos nas por para com não se mais como mas foi ao "
            "ele ela ou ser tem são seu sua pelo pela isso este esta também já entre quando muito até há à às eu"
        ),
        "nl": (
            "de het een en van in is dat die te op zijn met voor niet aan er om ook als door maar bij uit naar "
            "dan nog wordt werd heeft hij zij ze over tot deze dit hun was of wat meer kan geen worden ik je wij"
        ),
        "sv": (
            "och att det i en som är på för med av den till inte har de ett om var jag från men så kan vi när "
            "eller han hon ska också efter nu vid där mycket blev under alla detta sig sin sina man"
        ),
        "da": (
            "og at det i en som er på for med af den til ikke har de et om var jeg fra men så kan vi når eller "
            "han hun skal også efter nu ved der meget blev under alle dette sig sin man være blive hvor deres"
        ),
        "no": (
            "og at det i en som er på for med av den til ikke har de et om var jeg fra men så kan vi når eller "
            "han hun skal også etter nå ved der mye ble under alle dette seg sin man være bli hvor deres"
        ),
        "fi": (
            "ja on ei se että oli hän en mutta ovat kuin myös tai niin jos kun joka ole sen hänen mitä vain ollut "
            "siitä nyt sitä tämä mukaan olla jo minä sekä ne tämän kanssa voi jotka ennen jälkeen vielä"
        ),
        "pl": (
            "i w na z do się nie że jest to o jak ale po za od przez dla co tak by był było są oraz już ze jego "
            "jej może tylko który która które ich gdy czy przy tym bardzo też więc być lub tego"
        ),
        "cs": (
            "a v se na je že to s z do o i ve ale pro by jako za jsou od jeho po podle který která které při jak "
            "není také k ze již nebo tak jen byl bylo než až však být co ještě si její může"
        ),
        "hu": (
            "a az és hogy nem is egy van volt de ez meg csak már még mint vagy azt ha ki el be minden után lehet "
            "azonban ezt kell nagyon mert majd amely aki sem úgy között pedig szerint illetve ami"
        ),
        "ro": (
            "și în de la a cu pe că nu este o un să din pentru care mai sunt ca fost prin sau dar după ce cel cea "
            "ei lui au fi între până acest această când foarte se al ale lor decât îl își"
        ),
        "tr": (
            "ve bir bu da de için ile olarak çok daha olan gibi en ne kadar var sonra ama değil o her ya ki veya "
            "olduğu göre ben mi ise diye hem şey ancak tarafından kendi büyük sadece"
        ),
        "vi": (
            "và của là có được cho trong các một những không với này người đã để khi từ đến như về ra cũng thì "
            "tại vào nhiều theo trên sau đó rằng hay nhưng phải bị năm chỉ"
        ),
        "id": (
            "yang dan di dari untuk dengan ini itu pada tidak adalah dalam akan ke oleh sebagai juga atau ada "
            "karena saya kami mereka dapat telah bisa lebih sudah hanya kita seperti saat bahwa tersebut para"
        ),
    },
    "cyrillic": {
        "ru": (
            "и в не на что с по это как к но он из у за от так же о все был для его а она было то бы только мы "
            "они еще ещё или если при быть уже есть когда чтобы этого который которые до их"
        ),
        "uk": (
            "і в не на що з до та це як у але він за від так же про був для його а вона було б тільки ми вони ще "
            "або якщо при бути вже є коли щоб цього який які їх й із також після між"
        ),
        "bg": (
            "и в на се да не за от с са по е че като това си до той но ще или тя най след което бе още при към му "
            "съм които много само може бил има над през беше ги така"
        ),
        "sr": (
            "и у је да на се за од су са не као што то али би из који до или о по бити није ће га само јер након "
            "овај све био била било били које која међу још када"
        ),
    },
    "greek": {
        "el": ("και το της η ο του να την που με για τα από είναι στο στην οι των δεν τον σε θα τη ένα μια μας"),
    },
    "arabic": {
        "ar": (
            "من في على أن إلى عن هذا هذه التي الذي ما لا مع كان كانت هو هي أو قد كل بعد بين ذلك لم لن ثم حيث إن كما"
        ),
        "fa": ("و در به از که این را با است برای آن یک خود تا کرد بر هم نیز شده می شد اما یا ها باید دارد بود هر"),
    },
    "hebrew": {
        "he": ("של את על לא הוא זה עם היא כי אם גם או כל יש אני הם אל היה מה רק אך אבל בין עד אין לו כך היו"),
    },
    "devanagari": {
        "hi": ("के में की है से का को और पर ने एक भी कि यह हैं इस नहीं कर तो ही था या हो लिए गया अपने जो साथ वह"),
    },
    "bengali": {"bn": ""},
    "tamil": {"ta": ""},
    "thai": {"th": ""},
    "han": {"zh": ""},
    "kana": {"ja": ""},
    "hangul": {"ko": ""},
}
