// Original and avatar, one clock: the avatar leads, the original follows
import { find, show, write } from './dom.js'

const [original, avatar, scrub, player] = ['video-original', 'video-avatar', 'scrub', 'player'].map(find)
const APART_S = 0.05 // a frame at 24 a second is 0.042
let fps = 24
let offset = 0 // where in the original the avatar begins
let frames = 0
let own = '' // an object URL of a chosen original

export function load(avatarAddress, originalAddress, result) {
  stop()
  fps = result.fps
  offset = result.start_s || 0
  frames = result.frames
  scrub.max = Math.max(frames - 1, 0)
  scrub.value = 0
  find('screens').style.setProperty('--aspect', String(result.width / result.height))
  find('screens').classList.toggle('upright', result.height > result.width)
  show(find('avatar-missing'), false)
  show(find('sound'), result.has_audio)
  avatar.src = avatarAddress
  setOriginal(originalAddress)
  tell()
}

export function setOriginal(address) {
  if (own && own !== address) URL.revokeObjectURL(own)
  own = address && address.startsWith('blob:') ? address : ''
  show(find('original-missing'), !address)
  write(find('original-why'), 'The original of this video is not known here.')
  if (!address) return original.removeAttribute('src'), original.load()
  original.src = address
  original.addEventListener('loadedmetadata', () => seek(Number(scrub.value)), { once: true })
}

export function stop() {
  for (const video of [original, avatar]) video.pause()
}

export function unload() {
  stop()
  for (const video of [original, avatar]) { video.removeAttribute('src'); video.load() }
}

const frameNow = () => Math.min(Math.floor(avatar.currentTime * fps + 1e-3), frames - 1)

function seek(frame) {
  const at = (frame + 0.5) / fps // the middle of a frame, so that rounding shows no other one
  avatar.currentTime = at
  if (original.readyState) original.currentTime = offset + at
  tell(frame)
}

function tell(frame = frameNow()) {
  const text = `${(frame / fps).toFixed(2)} / ${(frames / fps).toFixed(2)} s`
  scrub.value = frame
  scrub.setAttribute('aria-valuetext', `frame ${frame + 1} of ${frames}, ${(frame / fps).toFixed(2)} seconds`)
  write(find('clock'), text)
}

async function toggle() {
  if (!avatar.paused) return stop()
  if (frameNow() >= frames - 1 || avatar.ended) seek(0)
  if (original.readyState) original.currentTime = offset + avatar.currentTime
  await Promise.allSettled([avatar.play(), original.readyState ? original.play() : null])
  requestAnimationFrame(follow)
}

function follow() {
  if (avatar.paused) return
  const apart = original.currentTime - offset - avatar.currentTime
  if (Math.abs(apart) > 0.3) original.currentTime = offset + avatar.currentTime
  else original.playbackRate = Math.abs(apart) > APART_S ? (apart > 0 ? 0.9 : 1.1) : 1
  tell()
  requestAnimationFrame(follow)
}

find('play').addEventListener('click', toggle)
scrub.addEventListener('input', () => { stop(); seek(Number(scrub.value)) })
find('sound').addEventListener('click', event => {
  avatar.muted = !avatar.muted
  event.currentTarget.setAttribute('aria-pressed', String(!avatar.muted))
})
find('screens').addEventListener('click', event => { if (event.target.tagName === 'VIDEO') toggle() })
for (const kind of ['play', 'pause', 'ended']) {
  avatar.addEventListener(kind, () => {
    const playing = !avatar.paused && !avatar.ended
    player.classList.toggle('playing', playing)
    find('play').setAttribute('aria-label', playing ? 'Pause' : 'Play')
    if (!playing) { original.pause(); original.playbackRate = 1; tell() }
  })
}
avatar.addEventListener('error', () => { if (avatar.hasAttribute('src')) show(find('avatar-missing'), true) })
original.addEventListener('error', () => {
  if (!original.hasAttribute('src')) return
  write(find('original-why'), 'This browser cannot play the original.')
  show(find('original-missing'), true)
})
find('original-file').addEventListener('change', event => {
  const file = event.target.files[0]
  if (file) setOriginal(URL.createObjectURL(file))
})
